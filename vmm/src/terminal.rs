//! Sets the terminal on stdin to raw mode while the guest uses it, and restores it afterwards.
//!
//! Raw mode lasts as long as [`RawTerminal`]. A panic hook restores the terminal, too. Only a signal that kills the
//! process leaves the terminal in raw mode.

use std::io::{IsTerminal, stdin};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use nix::sys::termios::{InputFlags, LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

static BEFORE: OnceLock<Plain> = OnceLock::new();

/// The terminal's settings before raw mode.
#[derive(Debug)]
struct Plain(libc::termios);

/// Keeps the terminal in raw mode until it is dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Sets the terminal on stdin to raw mode. Returns `None` if stdin is not a terminal or belongs to another job.
    pub fn enter() -> nix::Result<Option<Self>> {
        let stdin = stdin();
        if !stdin.is_terminal() || tcgetpgrp(stdin.as_fd()) != Ok(getpgrp()) {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let plain = BEFORE.get_or_init(|| Plain(before.clone().into()));
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |information| {
            restore(plain);
            hook(information);
        }));
        let mut raw = before;
        // Output processing stays on, so that log messages on the same terminal keep their line ends.
        raw.input_flags &= !(InputFlags::ICRNL | InputFlags::INLCR | InputFlags::IGNCR | InputFlags::IXON);
        raw.input_flags &=
            !(InputFlags::BRKINT | InputFlags::ISTRIP | InputFlags::PARMRK | InputFlags::IGNBRK);
        raw.local_flags &= !(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ECHONL);
        raw.local_flags &= !(LocalFlags::ISIG | LocalFlags::IEXTEN);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(plain) = BEFORE.get() {
            restore(plain);
        }
    }
}

fn restore(plain: &Plain) {
    // Fails if the terminal is gone; then there is nothing to restore.
    let _ = tcsetattr(stdin().as_fd(), SetArg::TCSANOW, &Termios::from(plain.0));
}
