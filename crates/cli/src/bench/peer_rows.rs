//! Peers as forms that are timed with ours.

use std::{cell::RefCell, fs, path::PathBuf, rc::Rc};

use lawson::{Context, Error, ErrorKind, Result, WeightKind};

use super::{
    measure::{Forms, Measured},
    peers::{self, Peer, PeerKind, PeerSpec, Process},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Study},
    verify::Checked,
};

/// One variant of a peer on one configuration.
pub struct PeerForm {
    level: String,
    peer: Result<Peer>,
    /// Whether its result is [B, H, S, D], where ours is [B, S, H, D].
    heads_first: bool,
}

impl PeerForm {
    fn running(&mut self) -> Result<&mut Peer> {
        self.peer.as_mut().map_err(|e| e.clone())
    }

    fn output(&mut self, forms: &dyn Forms) -> Result<Checked> {
        let rows = forms.peer_rows();
        let out = self.running()?.output(rows)?;
        Ok(forms.verify_peer(&match out.shape[..] {
            _ if rows.is_some() => out.data,
            [b, h, s, d] if self.heads_first => swap_heads(&out.data, [b, h, s, d]),
            _ => out.data,
        }))
    }

    /// Seconds and errors of the first call.
    pub fn first(&mut self, forms: &dyn Forms) -> Result<(f64, Checked)> {
        let seconds = self.running()?.time_once()?;
        Ok((seconds, self.output(forms)?))
    }

    /// Seconds of another call, and its errors when it is the last.
    pub fn again(&mut self, forms: &dyn Forms, last: bool) -> Result<(f64, Option<Checked>)> {
        let seconds = self.running()?.time_once()?;
        Ok((seconds, if last { Some(self.output(forms)?) } else { None }))
    }
}

/// [A, B, C, D] to [A, C, B, D].
pub fn swap_heads(from: &[f32], [a, b, c, d]: [usize; 4]) -> Vec<f32> {
    let mut to = Vec::with_capacity(from.len());
    for i in 0..a {
        for k in 0..c {
            (0..b).for_each(|j| to.extend_from_slice(&from[((i * b + j) * c + k) * d..][..d]));
        }
    }
    to
}

/// The peers of one configuration, and the folder with their inputs.
pub struct PeerSet {
    /// Every variant of every peer that is installed.
    pub forms: Vec<PeerForm>,
    folder: Option<PathBuf>,
}

impl PeerSet {
    /// No peer.
    pub fn none() -> Self {
        PeerSet { forms: Vec::new(), folder: None }
    }
}

impl Drop for PeerSet {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            // What cannot be removed the system clears.
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// What peers measure, for people.
pub fn measured(context: &Context) -> &'static str {
    match context.gpu() {
        Some(_) => "block, qkv, softmax, rope, attention without a past, and decode",
        None => "block, qkv, attention without a past, and decode",
    }
}

/// Whether the peer `kind` measures `case` on the context's device.
pub fn measures(kind: PeerKind, case: &Case, context: &Context) -> bool {
    // No peer takes new tokens behind a past in the study of attention.
    let behind = case.measured_by() == Study::Attention && case.shape.past > 0;
    // They multiply in the compute dtype.
    let int8 = case.shape.weights != WeightKind::Compute;
    case.peers && !behind && !int8 && !variants(context, case, kind).is_empty()
}

/// Starts every variant of every installed peer on `case`; `inputs` gives name, shape and elements.
pub fn start<'a, S: AsRef<[usize]> + 'a>(
    session: &Session,
    case: &Case,
    inputs: impl FnOnce() -> Vec<(&'static str, S, std::borrow::Cow<'a, [f32]>)>,
) -> Result<PeerSet> {
    start_without(session, case, &[], inputs)
}

/// Variants of `kind` for `case` on the context's device.
fn variants(context: &Context, case: &Case, kind: PeerKind) -> &'static [&'static str] {
    match context.gpu() {
        Some(_) => kind.variants_on_gpu(case.measured_by().name(), case.shape.dtype),
        None => kind.variants(case.measured_by().name()),
    }
}

/// As [`start`], but for the variants that `without` names.
pub fn start_without<'a, S: AsRef<[usize]> + 'a>(
    session: &Session,
    case: &Case,
    without: &[&str],
    inputs: impl FnOnce() -> Vec<(&'static str, S, std::borrow::Cow<'a, [f32]>)>,
) -> Result<PeerSet> {
    let study = case.measured_by();
    let of = |&kind: &PeerKind| variants(&session.context, case, kind).iter().map(move |v| (kind, *v));
    let measuring = session.peers.iter().filter(|k| measures(**k, case, &session.context));
    let wanted: Vec<_> = measuring.flat_map(of).filter(|(_, v)| !without.contains(v)).collect();
    if wanted.is_empty() {
        return Ok(PeerSet::none());
    }
    let s = &case.shape;
    let folder = peers::scratch_folder()?;
    let mut set = PeerSet { forms: Vec::new(), folder: Some(folder.clone()) };
    let path = folder.join("inputs.safetensors");
    let tensors = inputs();
    let views: Vec<(&str, &[usize], &[f32])> =
        tensors.iter().map(|(n, shape, data)| (*n, shape.as_ref(), data.as_ref())).collect();
    peers::write_inputs(&path, &views)?;
    let attention = matches!(study, Study::Attention | Study::Decode);
    for (kind, variant) in wanted {
        session.check()?;
        session.bar.set_message(format!("{}: starting {} {variant}", case.name(), kind.name()));
        let spec = PeerSpec {
            study: study.name(),
            variant,
            batch: s.batch,
            seq: s.seq,
            past: if study == Study::Decode { s.past + s.seq } else { s.past },
            hidden: s.hidden,
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            causal: s.causal,
            rope: s.rope,
            dtype: s.dtype,
            threads: session.threads(),
            device: session.context.device().to_string(),
            inputs: path.clone(),
        };
        let fits = s.kv_dtype == s.dtype;
        let peer = if fits && session.context.gpu().is_some() {
            on_gpu(session, kind, set.forms.is_empty()).and_then(|process| Peer::join(&process, &spec))
        } else if fits {
            Peer::start(kind, &spec)
        } else {
            let what = format!("{} has no {} cache beside {} queries", kind.name(), s.kv_dtype, s.dtype);
            Err(Error::new(ErrorKind::Unavailable, what))
        };
        set.forms.push(PeerForm { level: format!("peer:{}-{variant}", kind.name()), peer, heads_first: attention });
    }
    Ok(set)
}

/// The process that serves every configuration on the GPU, freed of what it holds when `anew`.
fn on_gpu(session: &Session, kind: PeerKind, anew: bool) -> Result<Rc<RefCell<Process>>> {
    let mut kept = session.torch.borrow_mut();
    let mut process = kept.take().filter(|process| process.borrow().alive());
    if anew && process.as_ref().is_some_and(|process| process.borrow_mut().forget().is_err()) {
        process = None;
    }
    let process = match process {
        Some(process) => process,
        None => Rc::new(RefCell::new(Process::start(kind, session.threads())?)),
    };
    *kept = Some(Rc::clone(&process));
    Ok(process)
}

/// Rows of the peers that were measured, and of those that are not installed.
pub fn rows_of(session: &Session, case: &Case, set: &PeerSet, measured: &[Measured], work: Work) -> Vec<Row> {
    let ran = set.forms.iter().zip(measured).map(|(form, m)| {
        let mut row = rows::base(session, case, &form.level);
        rows::measured(&mut row, m, work);
        if let Ok(peer) = &form.peer {
            rows::remark(&mut row, peer.version());
        }
        row
    });
    let absent = session.missing.iter().filter(|(kind, _)| measures(*kind, case, &session.context));
    let missing = absent.map(|(kind, why)| {
        let mut row = rows::base(session, case, &format!("peer:{}", kind.name()));
        rows::remark(&mut row, why);
        row
    });
    ran.chain(missing).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn heads_and_tokens_swap() {
        let from: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let to = super::swap_heads(&from, [1, 3, 2, 2]);
        assert_eq!(to, [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 2.0, 3.0, 6.0, 7.0, 10.0, 11.0]);
        assert_eq!(super::swap_heads(&to, [1, 2, 3, 2]), from);
    }
}
