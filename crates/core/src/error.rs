//! The one error type of every Lawson crate.

use std::fmt;

/// What sort of thing went wrong; exit codes and callers' decisions follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller's input is wrong: a shape, a dtype, a key, a file, a range.
    InvalidInput,
    /// This machine or build lacks what was asked for.
    Unavailable,
    /// Memory could not be had.
    OutOfMemory,
    /// Stored data contradicts itself.
    Corrupt,
    /// A device or the operating system failed.
    Device,
    /// The caller asked to stop.
    Cancelled,
}

/// A failure: its [`ErrorKind`] and one sentence that says what and where.
#[derive(Clone)]
pub struct Error(Box<(ErrorKind, String)>);

/// `Result` with Lawson's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` whose sentence is `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Box::new((kind, message.into())))
    }
    /// [`ErrorKind::InvalidInput`] with `message`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }
    /// What sort of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.0
    }
    /// The same failure with `place` (a file, a tensor) named before its sentence.
    pub fn at(self, place: impl fmt::Display) -> Self {
        let (kind, message) = *self.0;
        Self::new(kind, format!("{place}: {message}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.1)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.0, self.0.1)
    }
}

impl std::error::Error for Error {}
