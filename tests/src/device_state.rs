//! The front-end's side of a device state transfer (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`), and the files and
//! sockets that carry the state.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::pipe2;

use crate::backend::{Backend, Rig};
use crate::datapath::Datapath;
use crate::fake_frontend::net::features;
use crate::fake_frontend::wire::{Message, protocol, request};
use crate::fake_frontend::{Connection, Device, Options};
use crate::process::Process;

/// The reply to a `SET_DEVICE_STATE_FD` that succeeds and returns no descriptor.
pub const ACCEPTED: u64 = 0x100;
/// The reply to a `SET_DEVICE_STATE_FD` that fails.
pub const REFUSED: u64 = 0x101;

/// The options of a device whose front-end negotiates `DEVICE_STATE`.
pub fn options(queue_pairs: u16) -> Options {
    Options {
        queue_pairs,
        features: Options::default().features | features::MQ,
        protocol_features: Options::default().protocol_features | protocol::DEVICE_STATE,
        ..Options::default()
    }
}

/// Creates a pair of connected sockets.
///
/// # Errors
/// Returns an error if the sockets cannot be created.
pub fn pair(kind: SockType) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Creates a pipe. Returns its read end and its write end, which are close-on-exec, so that no back-end inherits one.
///
/// # Errors
/// Returns an error if the pipe cannot be created.
pub fn pipe() -> Result<(File, File)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write.into()))
}

/// Creates a pseudoterminal that polls as writable but blocks a write before it completes. Returns the end to write to
/// first.
///
/// # Errors
/// Returns an error if a system call on the terminal fails.
pub fn nearly_full_terminal() -> Result<(File, File)> {
    let OpenptyResult { master, slave } = openpty(None, None)?;
    let mut mode = tcgetattr(&slave)?;
    cfmakeraw(&mut mode);
    tcsetattr(&slave, SetArg::TCSANOW, &mode)?;
    let flags = OFlag::from_bits_retain(fcntl(&slave, FcntlArg::F_GETFL)?);
    fcntl(&slave, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let (mut slave, mut master) = (File::from(slave), File::from(master));
    let writable = |slave: &File, patience: PollTimeout| -> Result<bool> {
        Ok(poll(&mut [PollFd::new(slave.as_fd(), PollFlags::POLLOUT)], patience)? == 1)
    };
    // A kernel thread moves data on to the reader's buffer, so the terminal may become writable again.
    while writable(&slave, PollTimeout::from(100u8))? {
        match slave.write(&[b'x'; 4096]) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            _ => {}
        }
    }
    while !writable(&slave, PollTimeout::from(20u8))? {
        ensure!(master.read(&mut [0])? == 1);
    }
    fcntl(&slave, FcntlArg::F_SETFL(flags))?;
    Ok((slave, master))
}

/// Sends the back-end a descriptor to save its state to, or to load it from. Returns the reply's value.
///
/// # Errors
/// Returns an error if the back-end does not reply.
pub fn set_state_fd(connection: &Connection, save: bool, fd: impl AsFd) -> Result<u64> {
    let payload = connection.ask_with(&Message::device_state(save), &[fd.as_fd()])?;
    Ok(u64::from_le_bytes(payload.as_slice().try_into()?))
}

/// Asks whether the transfer succeeded.
///
/// # Errors
/// Returns an error if the back-end does not reply.
pub fn check(connection: &Connection) -> Result<bool> {
    Ok(connection.ask_u64(&Message::empty(request::CHECK_DEVICE_STATE))? == 0)
}

/// Waits until the back-end has logged `text`, which it may do after it replies.
///
/// # Errors
/// Returns an error if the back-end does not log the text in time.
pub fn wait_log(backend: &mut Backend, text: &str) -> Result<()> {
    let logged = |process: &Process| Ok(process.log().contains(text).then_some(()));
    backend.process.wait_until(&format!("it logged \"{text}\""), logged)
}

/// Negotiates the features of [`options`].
///
/// # Errors
/// Returns an error if the back-end refuses.
pub fn negotiate(connection: Connection) -> Result<Connection> {
    let options = options(1);
    connection.get_features()?;
    connection.set_protocol_features(options.protocol_features)?;
    connection.set_features(options.features)?;
    Ok(connection)
}

/// Connects a front-end to a back-end that waits for a device, and negotiates the features.
///
/// # Errors
/// Returns an error if the back-end refuses.
pub fn negotiated(target: &mut Backend) -> Result<Connection> {
    negotiate(target.connect()?)
}

/// Brings a device up, checks it and stops it, and starts a back-end that waits for a device. Each has a front-end.
///
/// # Errors
/// Returns an error if either back-end cannot be set up, or the device does not work.
pub fn stopped(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend, Connection)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;
    let mut target = Backend::waiting(datapath, &[])?;
    let connection = negotiated(&mut target)?;
    Ok((rig, device, target, connection))
}

/// Moves the state of a stopped device to another back-end, through a socket pair.
///
/// # Errors
/// Returns an error if a back-end refuses or the transfer fails.
pub fn transfer(device: &Device, target: &Connection) -> Result<()> {
    let (ours, theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&device.connection, true, ours)? == ACCEPTED);
    ensure!(check(&device.connection)?, "the source did not save the state");
    ensure!(set_state_fd(target, false, theirs)? == ACCEPTED);
    ensure!(check(target)?, "the target did not load the state");
    Ok(())
}
