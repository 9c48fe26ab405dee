//! Timing: forms of one computation in turn, each verified before and after, over outputs that are NaN before each call.

use std::time::Instant;

use lawson::{Result, machine::Memory};

use super::{peer_rows::PeerForm, session::Session, statistics::Times, verify::Checked};

/// Forms of one computation over the same inputs.
pub trait Forms {
    /// How many there are.
    fn count(&self) -> usize;
    /// Makes NaN of what form `i` shall write, `everything` of it or only what every call writes anew cheaply.
    fn poison(&mut self, i: usize, everything: bool) -> Result<()>;
    /// One call of form `i`; gives its seconds.
    fn call(&mut self, i: usize) -> Result<f64>;
    /// Compares what the last call, of form `i`, wrote with the oracle.
    fn verify(&mut self, i: usize) -> Result<Checked>;
    /// Compares a peer's result: of [`Forms::peer_rows`], where they are given.
    fn verify_peer(&self, data: &[f32]) -> Checked;
    /// Rows, as wide as a token's or a row's result, that a peer's result is taken from; all of it when `None`.
    fn peer_rows(&self) -> Option<&[usize]> {
        None
    }
    /// Seconds of a call of form `i` that finds nothing of what it reads in a GPU's second-level cache; `None` where there is no such thing.
    fn cold(&mut self, _: usize) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// Forms whose time is that of reading known memory.
pub trait Reads: Forms {
    /// What the next call reads.
    fn memory(&self) -> Vec<Memory<'_>>;
    /// Goes on to the next copy of it, where there are several.
    fn advance(&mut self) {}
}

/// How long a configuration may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Seconds of all timed calls together.
    pub seconds: f64,
    /// Fewest timed calls of each form.
    pub least: usize,
    /// Most timed calls of each form.
    pub most: usize,
}

/// What was measured of one form or peer.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Its timed calls.
    pub times: Times,
    /// Median seconds of calls with a cold cache, on a GPU.
    pub cold: Option<f64>,
    /// The last timed call's errors.
    pub checked: Option<Checked>,
    /// Why there is no time.
    pub failed: Option<String>,
}

/// Seconds that `f` takes.
pub fn time(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Below this a first call says little about the next ones.
const SHORT: f64 = 0.05;

/// Calls with a cold cache.
const COLD_CALLS: usize = 5;

/// Verifies every form and peer, times those that are right in turn, and verifies the last timed output of each. Forms come first in
/// the result, then peers.
pub fn measure(session: &Session, forms: &mut dyn Forms, peers: &mut [PeerForm]) -> Result<Vec<Measured>> {
    measure_within(session, session.budget, forms, peers)
}

/// As [`measure`], within `budget`.
pub fn measure_within(session: &Session, budget: Budget, forms: &mut dyn Forms, peers: &mut [PeerForm]) -> Result<Vec<Measured>> {
    let count = forms.count();
    let mut found = vec![Measured::default(); count + peers.len()];
    let mut seconds = vec![Vec::new(); found.len()];
    let mut round = 0.0;
    for (i, m) in found.iter_mut().enumerate() {
        session.check()?;
        match i.checked_sub(count) {
            None => {
                forms.poison(i, true)?;
                let mut first = forms.call(i)?;
                judge(m, forms.verify(i)?);
                if first < SHORT {
                    first = forms.call(i)?;
                }
                round += first;
            }
            Some(p) => match peers[p].first(&*forms) {
                Ok((first, checked)) => {
                    judge(m, checked);
                    round += first;
                }
                Err(e) => m.failed = Some(e.to_string()),
            },
        }
    }
    let rounds = ((budget.seconds / round.max(1e-9)) as usize).clamp(budget.least, budget.most);
    for run in 0..rounds {
        let last = run + 1 == rounds;
        for i in 0..found.len() {
            session.check()?;
            if found[i].failed.is_some() {
                continue;
            }
            match i.checked_sub(count) {
                None => {
                    forms.poison(i, last)?;
                    seconds[i].push(forms.call(i)?);
                    if last {
                        judge(&mut found[i], forms.verify(i)?);
                    }
                }
                Some(p) => match peers[p].again(&*forms, last) {
                    Ok((time, checked)) => {
                        seconds[i].push(time);
                        checked.into_iter().for_each(|c| judge(&mut found[i], c));
                    }
                    Err(e) => found[i].failed = Some(e.to_string()),
                },
            }
        }
    }
    for (i, m) in found.iter_mut().enumerate().take(count).filter(|(_, m)| m.failed.is_none()) {
        let calls = (0..COLD_CALLS).map(|_| forms.cold(i)).collect::<Result<Option<Vec<f64>>>>()?;
        m.cold = calls.map(|calls| Times::new(calls).median());
    }
    for (m, seconds) in found.iter_mut().zip(seconds) {
        m.times = Times::new(if m.failed.is_some() { Vec::new() } else { seconds });
    }
    Ok(found)
}

fn judge(m: &mut Measured, checked: Checked) {
    if !checked.ok {
        m.failed = Some(format!("failed: {}", checked.message));
    }
    m.checked = Some(checked);
}
