//! What a front-end does to move device state (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`).

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

/// The answer to a `SET_DEVICE_STATE_FD` that succeeds, and returns no descriptor.
pub const ACCEPTED: u64 = 0x100;
/// The answer to one that fails.
pub const REFUSED: u64 = 0x101;

/// Of a front-end that can move device state.
pub fn options(queue_pairs: u16) -> Options {
    Options {
        queue_pairs,
        features: Options::default().features | features::MQ,
        protocol_features: Options::default().protocol_features | protocol::DEVICE_STATE,
        ..Options::default()
    }
}

/// Two ends of a socket.
///
/// # Errors
/// The system's.
pub fn pair(kind: SockType) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Two ends of a pipe: to read, and to write. No back-end that is started later keeps one open.
///
/// # Errors
/// The system's.
pub fn pipe() -> Result<(File, File)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write.into()))
}

/// A pseudoterminal that says it is writable, and blocks what is written before it is full: first the end to write to.
///
/// # Errors
/// The system's.
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
    // It is emptied by a thread of the kernel, up to the reader's own buffer, so that it may be writable again.
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

/// Gives the back-end a descriptor for its state. Gives its answer.
///
/// # Errors
/// If there is none.
pub fn set_state_fd(connection: &Connection, save: bool, fd: impl AsFd) -> Result<u64> {
    let payload = connection.ask_with(&Message::device_state(save), &[fd.as_fd()])?;
    Ok(u64::from_le_bytes(payload.as_slice().try_into()?))
}

/// Whether the transfer has succeeded.
///
/// # Errors
/// If there is no answer.
pub fn check(connection: &Connection) -> Result<bool> {
    Ok(connection.ask_u64(&Message::empty(request::CHECK_DEVICE_STATE))? == 0)
}

/// Waits for what is logged after an answer.
///
/// # Errors
/// If it is not.
pub fn wait_log(backend: &mut Backend, text: &str) -> Result<()> {
    let logged = |process: &Process| Ok(process.log().contains(text).then_some(()));
    backend.process.wait_until(&format!("it logged \"{text}\""), logged)
}

/// Negotiates everything that [`options`] name.
///
/// # Errors
/// If the back-end refuses.
pub fn negotiate(connection: Connection) -> Result<Connection> {
    let options = options(1);
    connection.get_features()?;
    connection.set_protocol_features(options.protocol_features)?;
    connection.set_features(options.features)?;
    Ok(connection)
}

/// A front-end of a back-end that waits for a device, with everything negotiated.
///
/// # Errors
/// If the back-end refuses.
pub fn negotiated(target: &mut Backend) -> Result<Connection> {
    negotiate(target.connect()?)
}

/// A device that works, stopped, and a back-end that waits, with a front-end each.
///
/// # Errors
/// If it does not work.
pub fn stopped(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend, Connection)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    device.suspend()?;
    let mut target = Backend::waiting(datapath, &[])?;
    let connection = negotiated(&mut target)?;
    Ok((rig, device, target, connection))
}

/// Moves the state from the stopped device's back-end to the other one.
///
/// # Errors
/// If it does not work.
pub fn transfer(device: &Device, target: &Connection) -> Result<()> {
    let (ours, theirs) = pair(SockType::SeqPacket)?;
    ensure!(set_state_fd(&device.connection, true, ours)? == ACCEPTED);
    ensure!(check(&device.connection)?, "the source could not save");
    ensure!(set_state_fd(target, false, theirs)? == ACCEPTED);
    ensure!(check(target)?, "the target could not load");
    Ok(())
}
