//! What every study of one run shares.

use std::{cell::RefCell, rc::Rc};

use indicatif::ProgressBar;
use lawson::{Context, Error, ErrorKind, Level, Result};

use super::{
    measure::Budget,
    peers::{PeerKind, Process},
    rows::Limits,
};
use crate::{args::Global, signals};

/// One run of the benchmark.
pub struct Session<'a> {
    /// What is measured.
    pub context: Context,
    /// Flags of every command.
    pub global: &'a Global,
    /// Levels asked for, least fused first.
    pub levels: Vec<Level>,
    /// Time of a configuration.
    pub budget: Budget,
    /// The machine's limits as measured at the start, for choosing sizes.
    pub limits: Limits,
    /// Memory that `throughput` counts sequences for.
    pub memory_limit: u64,
    /// Neighbours of a kernel's shape that are measured.
    pub neighbours: usize,
    /// Peers that can run.
    pub peers: Vec<PeerKind>,
    /// Peers asked for that cannot, and why.
    pub missing: Vec<(PeerKind, String)>,
    /// PyTorch on the GPU, once it was started: its start takes long, so that one process serves every configuration.
    pub torch: RefCell<Option<Rc<RefCell<Process>>>>,
    /// Progress on stderr.
    pub bar: ProgressBar,
}

impl Session<'_> {
    /// Ends the run when Ctrl-C was pressed.
    ///
    /// # Errors
    /// `Cancelled` then.
    pub fn check(&self) -> Result<()> {
        if signals::interrupted() {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted; no report was written"));
        }
        Ok(())
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.context.threads()
    }

    /// A context like this run's that has not computed anything.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub fn cold(&self) -> Result<Context> {
        self.global.context_on(Some(self.context.isa()))
    }

    /// The forms, each named by its level, that the levels asked for select; all when they select none.
    pub fn select<T: Copy>(&self, forms: &[(Level, T)]) -> Vec<(Level, T)> {
        let chosen: Vec<_> = forms.iter().filter(|f| self.levels.contains(&f.0)).copied().collect();
        if chosen.is_empty() { forms.to_vec() } else { chosen }
    }
}
