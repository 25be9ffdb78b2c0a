//! A TAP without virtio: the limit that the kernel sets. Reads into, or writes from, as many buffers as a ring has.
#![expect(unsafe_code, reason = "readv, writev and io_uring take pointers to buffers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::guest::HEADER;
use super::source::frame;
use crate::netns::open_tun;

/// Number of buffers, as in a ring.
const BUFFERS: usize = 256;
/// Number of writes that are submitted to io_uring together.
const DEPTH: u32 = 32;

/// How to move frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One `writev` per frame
    Writev,
    /// Batches of 32 writes through io_uring, with a fixed file
    IoUring,
    /// One `readv` per frame
    Readv,
}

/// The options of the process.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Name of the TAP
    #[arg(long)]
    pub tap: String,
    /// How to move frames
    #[arg(long)]
    pub mode: Mode,
    /// Length of a frame in bytes
    #[arg(long)]
    pub frame: usize,
    /// Accept large frames
    #[arg(long)]
    pub offloads: bool,
}

/// Moves frames until the process is killed.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let tap = open_tun(&arguments.tap, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    let header = libc::c_int::try_from(HEADER)?;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
    Errno::result(result).context("TUNSETVNETHDRSZ")?;
    let offloads =
        if arguments.offloads { libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 } else { 0 };
    // SAFETY: TUNSETOFFLOAD takes a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    Errno::result(result).context("TUNSETOFFLOAD")?;
    fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("O_NONBLOCK")?;
    let (net_header, bytes) = frame(arguments.frame);
    let bytes = [&net_header.encode()[..], &bytes].concat();
    match arguments.mode {
        Mode::Writev => write_all(&tap, &bytes),
        Mode::IoUring => write_by_ring(&tap, &bytes),
        Mode::Readv => read_all(&tap, bytes.len()),
    }
}

fn write_all(tap: &impl AsFd, bytes: &[u8]) -> Result<()> {
    let buffers = vec![bytes.to_vec(); BUFFERS];
    loop {
        for buffer in &buffers {
            match nix::sys::uio::writev(tap, &[io::IoSlice::new(buffer)]) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => wait(tap, PollFlags::POLLOUT)?,
                Err(errno) => return Err(errno).context("writev"),
            }
        }
    }
}

fn write_by_ring(tap: &(impl AsFd + AsRawFd), bytes: &[u8]) -> Result<()> {
    let buffers = vec![bytes.to_vec(); BUFFERS];
    let ring = IoUring::builder().setup_single_issuer().build(DEPTH);
    let mut ring: IoUring = ring.context("io_uring_setup")?;
    ring.submitter().register_files(&[tap.as_raw_fd()])?;
    let length = u32::try_from(bytes.len())?;
    for batch in buffers.chunks(DEPTH as usize).cycle() {
        for buffer in batch {
            let entry = opcode::Write::new(types::Fixed(0), buffer.as_ptr(), length).build();
            // SAFETY: the buffer lives until the ring is dropped, and nothing changes it.
            unsafe { ring.submission().push(&entry) }.context("io_uring's submission queue is full")?;
        }
        ring.submit_and_wait(batch.len())?;
        for completion in ring.completion() {
            match completion.result() {
                result if result >= 0 => {}
                result if result == -libc::EAGAIN => wait(tap, PollFlags::POLLOUT)?,
                result => bail!("write through io_uring failed: {}", io::Error::from_raw_os_error(-result)),
            }
        }
    }
    Ok(())
}

fn read_all(tap: &impl AsFd, length: usize) -> Result<()> {
    let mut buffers = vec![vec![0; length.max(2048)]; BUFFERS];
    loop {
        for buffer in &mut buffers {
            loop {
                match nix::sys::uio::readv(tap, &mut [io::IoSliceMut::new(buffer)]) {
                    Ok(_) => break,
                    Err(Errno::EAGAIN) => wait(tap, PollFlags::POLLIN)?,
                    Err(errno) => return Err(errno).context("readv"),
                }
            }
        }
    }
}

fn wait(tap: &impl AsFd, events: PollFlags) -> Result<()> {
    poll(&mut [PollFd::new(tap.as_fd(), events)], PollTimeout::NONE)?;
    Ok(())
}
