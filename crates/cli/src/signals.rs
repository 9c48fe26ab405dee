//! Ctrl-C and SIGTERM. The first ends at once what can be dropped, and asks everything else to stop cleanly; the second ends the program.

use std::{
    io::Write,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use lawson::{Error, ErrorKind, Result};

/// Exit code of a program that a signal ended.
pub const EXIT_INTERRUPTED: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is left to do before the program may end, while work runs that can be dropped.
static LEFT: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(None);

fn left() -> MutexGuard<'static, Option<Box<dyn FnOnce() + Send>>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a signal came: finish the current piece of work, clean up and return.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Goes on unless a signal came.
///
/// # Errors
/// `Cancelled`, which ends the program with [`EXIT_INTERRUPTED`].
pub fn check() -> Result<()> {
    if interrupted() { Err(Error::new(ErrorKind::Cancelled, "interrupted")) } else { Ok(()) }
}

/// Does `work`, which a signal ends at once, and the program with it, after `clean_up`: neither files half written nor child processes may be
/// left behind then.
///
/// # Errors
/// `Cancelled` when a signal came before; as `work`.
pub fn droppable<T>(clean_up: impl FnOnce() + Send + 'static, work: impl FnOnce() -> Result<T>) -> Result<T> {
    *left() = Some(Box::new(clean_up));
    // A signal that came before its handler could find `clean_up` is seen here.
    let result = check().and_then(|()| work());
    *left() = None;
    result
}

/// Starts listening for signals.
///
/// # Errors
/// `Device` when the system does not let it.
pub fn listen() -> Result<()> {
    // It runs on a thread of its own, not in the signal's context.
    let handler = || {
        let second = INTERRUPTED.swap(true, Ordering::Relaxed);
        // The lock is held to the end, so that the work's thread cannot go on to write files meanwhile.
        let mut left = left();
        if let Some(clean_up) = left.take() {
            clean_up();
        } else if !second {
            return;
        }
        // Where nobody reads stderr any more there is nobody to tell; `eprintln!` would panic and end this thread instead of the program.
        let _ = writeln!(std::io::stderr(), "error: interrupted");
        std::process::exit(i32::from(EXIT_INTERRUPTED));
    };
    ctrlc::set_handler(handler).map_err(|e| Error::new(ErrorKind::Device, format!("Ctrl-C cannot be listened for: {e}")))
}
