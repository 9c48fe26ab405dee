//! Ctrl-C: the first asks to stop cleanly, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

use lawson::{Error, ErrorKind, Result};

/// Exit code of a program that Ctrl-C ended.
pub const EXIT_INTERRUPTED: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C was pressed: finish the current piece of work, clean up and return.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Goes on unless Ctrl-C was pressed.
///
/// # Errors
/// `Cancelled`, which ends the program with [`EXIT_INTERRUPTED`].
pub fn check() -> Result<()> {
    if interrupted() { Err(Error::new(ErrorKind::Cancelled, "interrupted")) } else { Ok(()) }
}

/// Starts listening for Ctrl-C.
///
/// # Errors
/// `Device` when the system does not let it.
pub fn listen() -> Result<()> {
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(EXIT_INTERRUPTED));
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::new(ErrorKind::Device, format!("Ctrl-C cannot be listened for: {e}")))
}
