//! Softmax in three passes, fused, and online by tiles.

use lawson::{
    Context, DType, Level, Result, Tensor,
    ops::{self, SoftmaxMethod},
};
use lawson_core::oracle;

use super::SEED;
use crate::bench::{
    inputs,
    measure::{Forms, measure, time},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::Case,
    verify::{self, Checked},
};

/// The article's tile.
const TILE: usize = 512;
/// Operations of an element: an exponential in f64, about.
const FLOPS: f64 = 100.0;

const METHODS: [(Level, (&str, SoftmaxMethod)); 3] = [
    (Level::Unfused, ("three-pass", SoftmaxMethod::ThreePass)),
    (Level::Minimal, ("fused", SoftmaxMethod::Fused)),
    (Level::Moderate, ("online", SoftmaxMethod::Online(TILE))),
];

struct SoftmaxForms<'a> {
    session: &'a Session<'a>,
    methods: Vec<SoftmaxMethod>,
    width: usize,
    x: Tensor,
    out: Tensor,
    nan: Tensor,
    rows: Vec<usize>,
    want: Vec<f64>,
}

impl SoftmaxForms<'_> {
    fn call_on(&mut self, i: usize, context: &Context) -> Result<()> {
        ops::softmax(context, &self.x.as_ref(), &mut self.out.as_mut(), self.methods[i])
    }
}

impl Forms for SoftmaxForms<'_> {
    fn count(&self) -> usize {
        self.methods.len()
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        inputs::copy(&self.nan, &mut self.out)
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        time(|| self.call_on(i, &self.session.context))
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        let got = verify::gather(&self.out.to_f32(), &self.rows, self.width);
        Ok(verify::check("softmax", verify::limit(&[DType::F32]), &got, &self.want, self.width))
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        verify::wrong_size(data.len(), 0)
    }
}

/// Every method.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let s = &case.shape;
    let chosen = session.select(&METHODS);
    let (count, width) = (s.batch * s.heads * s.seq, s.past + s.seq);
    let shape = [count, width];
    let x = inputs::normals(count * width, 1.0, DType::F32, SEED * 16 + 10, session.threads());
    let picked = verify::rows(count, (count * width) as f64 * FLOPS);
    let want = oracle::softmax(&verify::gather(&x, &picked, width), width);
    let nan = inputs::nans(DType::F32, &shape)?;
    let mut forms = SoftmaxForms {
        session,
        methods: chosen.iter().map(|c| c.1.1).collect(),
        width,
        x: Tensor::from_f32(&x, DType::F32, &shape)?,
        out: nan.clone(),
        nan,
        rows: picked,
        want,
    };
    drop(x);
    let found = measure(session, &mut forms, &mut [])?;
    let bytes = 8.0 * (count * width) as f64;
    let mut rows = Vec::new();
    for (i, ((level, (name, _)), m)) in chosen.into_iter().zip(&found).enumerate() {
        let mut row = rows::base(session, case, level.name());
        (row.dtype, row.variant) = (DType::F32.to_string(), Some(name.to_owned()));
        rows::measured(&mut row, m, Work { flops: None, bytes });
        row.resident_bytes = Some(bytes as u64);
        let cold = session.cold()?;
        forms.call_on(i, &cold)?;
        row.peak_bytes = Some(cold.workspace_bytes() as u64);
        rows.push(row);
    }
    rows::speedups(&mut rows);
    Ok(rows)
}
