//! The terminal on stdin: raw while the guest has it, and as it was on every way out.
//!
//! Raw mode lasts as long as [`RawTerminal`]; a panic restores the terminal too, through its hook. Only a
//! signal that cannot be caught leaves it raw.

use std::io::{IsTerminal, stdin};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use nix::sys::termios::{InputFlags, LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

static BEFORE: OnceLock<Plain> = OnceLock::new();

/// The terminal's settings before it was made raw.
#[derive(Debug)]
struct Plain(libc::termios);

/// The terminal is raw while this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw. `None` if stdin is no terminal, or is another job's.
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
        // Output stays as it is, so that messages on the same terminal keep their line ends.
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
    // The terminal may be gone: then there is nothing to restore.
    let _ = tcsetattr(stdin().as_fd(), SetArg::TCSANOW, &Termios::from(plain.0));
}
