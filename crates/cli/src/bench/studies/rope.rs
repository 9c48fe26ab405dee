//! Rotary embedding in two passes with a turned copy, or in one, in both layouts.

use lawson::{
    Context, DType, Level, Result, RopeLayout, RopeSpec, Tensor,
    ops::{self, RopeMethod},
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

/// Elements above which a sample is checked.
const WHOLE: usize = 1 << 24;

struct RopeForms<'a> {
    session: &'a Session<'a>,
    methods: Vec<RopeMethod>,
    spec: RopeSpec,
    width: usize,
    positions: Vec<usize>,
    /// The input; it is turned in place, so that each call gets it anew.
    original: Tensor,
    x: Tensor,
    tokens: Vec<usize>,
    want: Vec<f64>,
}

impl RopeForms<'_> {
    fn call_on(&mut self, i: usize, context: &Context) -> Result<()> {
        ops::rope(context, &mut self.x.as_mut(), &self.positions, &self.spec, self.methods[i])
    }
}

impl Forms for RopeForms<'_> {
    fn count(&self) -> usize {
        self.methods.len()
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        inputs::copy(&self.original, &mut self.x)
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        time(|| self.call_on(i, &self.session.context))
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        let got = verify::gather(&self.x.to_f32(), &self.tokens, self.width);
        Ok(verify::check("rope", verify::limit(&[DType::F32]), &got, &self.want, self.width))
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        verify::wrong_size(data.len(), 0)
    }
}

/// Both methods in both layouts.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let mut rows = of_layout(session, case, RopeLayout::Half, "half")?;
    rows.extend(of_layout(session, case, RopeLayout::Interleaved, "interleaved")?);
    Ok(rows)
}

fn of_layout(session: &Session, case: &Case, layout: RopeLayout, name: &str) -> Result<Vec<Row>> {
    let s = &case.shape;
    let chosen = session.select(&[(Level::Unfused, RopeMethod::TwoPass), (Level::Maximal, RopeMethod::Fused)]);
    let spec = RopeSpec { layout, ..RopeSpec::new(10000.0) };
    let (count, width) = (s.batch * s.seq, s.heads * s.head_dim);
    let shape = [count, s.heads, s.head_dim];
    let positions: Vec<usize> = (0..count).map(|t| s.past + t % s.seq).collect();
    let x = inputs::normals(count * width, 1.0, DType::F32, SEED * 16 + 11, session.threads());
    let tokens = if count * width <= WHOLE { (0..count).collect() } else { verify::pick(count, 64, 0) };
    let inverse = spec.frequencies(s.head_dim, s.past + s.seq).inverse;
    let angles: Vec<f64> = tokens
        .iter()
        .flat_map(|&t| (0..s.heads).map(move |_| t))
        .flat_map(|t| inverse.iter().map(|w| positions[t] as f64 * w).collect::<Vec<_>>())
        .collect();
    let want = oracle::rope(&verify::gather(&x, &tokens, width), s.head_dim, s.head_dim, layout, &angles);
    let original = Tensor::from_f32(&x, DType::F32, &shape)?;
    drop(x);
    let mut forms = RopeForms {
        session,
        methods: chosen.iter().map(|c| c.1).collect(),
        spec,
        width,
        positions,
        x: original.clone(),
        original,
        tokens,
        want,
    };
    let found = measure(session, &mut forms, &mut [])?;
    let bytes = 8.0 * (count * width) as f64;
    let mut rows = Vec::new();
    for (i, (&(level, method), m)) in chosen.iter().zip(&found).enumerate() {
        let mut row = rows::base(session, case, level.name());
        let form = if method == RopeMethod::TwoPass { "two-pass" } else { "fused" };
        (row.dtype, row.variant) = (DType::F32.to_string(), Some(format!("{form} {name}")));
        rows::measured(&mut row, m, Work { flops: None, bytes });
        row.resident_bytes = Some((bytes / 2.0) as u64);
        let cold = session.cold()?;
        forms.poison(i, true)?;
        forms.call_on(i, &cold)?;
        row.peak_bytes = Some(cold.workspace_bytes() as u64);
        rows.push(row);
    }
    rows::speedups(&mut rows);
    Ok(rows)
}
