//! Writes of many frames with one system call, by io_uring. Where the kernel does not have or allow it,
//! [`TapQueue::send`] writes each frame.
//!
//! All writes are non-blocking (`RWF_NOWAIT`), so the kernel executes them in order during the system call, and none is
//! outstanding afterwards. The instance is restricted to writes, because io_uring bypasses seccomp filters. It has no
//! registered file: the kernel releases such a file only tens of milliseconds after its process was killed, and a TAP
//! must be free at once for the next one. An instance is created only for a thread that has had many batches: idle
//! threads need none, and one that has just taken over a session has more urgent work.
#![expect(unsafe_code, reason = "passes vectors into guest memory to the kernel")]

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;

use baton_control::limited;
use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use super::queue::{Sent, TapQueue};
use crate::args;

/// The most frames of a batch.
pub const MAX_BATCH: u16 = 64;

/// After so many batches a writer creates its io_uring instance.
const FIRST_BATCHES: u32 = 16;

/// Writes batches of frames. Belongs to one thread.
pub struct BatchWriter {
    instance: Instance,
    /// The results of the batch, by position.
    results: Vec<Sent>,
}

enum Instance {
    /// None, after so many batches.
    None(u32),
    Ready(Box<IoUring>),
    /// Not allowed, or failed.
    Off,
}

impl fmt::Debug for BatchWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchWriter").finish_non_exhaustive()
    }
}

impl BatchWriter {
    /// Creates a writer without an io_uring instance.
    pub fn new(io_uring: args::IoUring) -> Self {
        let instance = match io_uring {
            args::IoUring::Auto => Instance::None(0),
            args::IoUring::Off => Instance::Off,
        };
        Self { instance, results: Vec::new() }
    }

    /// Returns whether the calling thread can write a batch with [`Self::send`]. Call this once for each batch. Creates
    /// the io_uring instance when it is time.
    pub fn is_ready(&mut self) -> bool {
        match &mut self.instance {
            Instance::None(batches) if *batches < FIRST_BATCHES => *batches += 1,
            Instance::None(_) => {
                self.instance = match create() {
                    Ok(ring) => Instance::Ready(Box::new(ring)),
                    Err(error) => {
                        tracing::debug!(%error, "no io_uring, the worker writes frame by frame");
                        Instance::Off
                    }
                };
                self.results.reserve(MAX_BATCH.into());
            }
            Instance::Ready(_) | Instance::Off => {}
        }
        matches!(self.instance, Instance::Ready(_))
    }

    /// Writes frames to `tap` in order, header first, and returns the result of each. A frame may be written although
    /// an earlier one was not. Frames beyond [`MAX_BATCH`] are left out, and all if the writer is not
    /// [ready](Self::is_ready).
    ///
    /// # Safety
    /// As for [`TapQueue::send`], for each frame.
    pub unsafe fn send<'a>(
        &mut self,
        tap: &TapQueue,
        frames: impl Iterator<Item = &'a [libc::iovec]>,
    ) -> &[Sent] {
        self.results.clear();
        let Instance::Ready(ring) = &mut self.instance else { return &[] };
        let mut queue = ring.submission();
        for (position, vectors) in (0u64..).zip(frames) {
            let entry = entry(tap, vectors).user_data(position);
            // SAFETY: vectors and memory stay valid until the write is complete, which is before this returns.
            if unsafe { queue.push(&entry) }.is_err() {
                break;
            }
            self.results.push(Sent::Interrupted);
        }
        drop(queue);
        let submitted = submit(ring, self.results.len());
        for completion in ring.completion() {
            let position = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
            if let Some(result) = self.results.get_mut(position) {
                *result = match completion.result() {
                    error if error == -libc::EOPNOTSUPP => {
                        tap.do_without_nowait();
                        Sent::Interrupted
                    }
                    result => tap.sent(result),
                };
            }
        }
        if let Err(error) = submitted {
            limited!(warn, %error, "io_uring failed, the worker writes frame by frame");
            self.instance = Instance::Off;
        }
        &self.results
    }
}

/// Creates an io_uring instance that allows nothing but writes by the calling thread. Needs Linux 6.1.
fn create() -> io::Result<IoUring> {
    let ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_r_disabled()
        .build(MAX_BATCH.into())?;
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// Submits the queued writes and waits until all `count` are complete.
fn submit(ring: &mut IoUring, count: usize) -> io::Result<()> {
    while ring.completion().len() < count {
        match ring.submit_and_wait(count) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns the write of a frame.
fn entry(tap: &TapQueue, vectors: &[libc::iovec]) -> Entry {
    let file = types::Fd(tap.file.as_raw_fd());
    if let [vector] = vectors
        && let Ok(length) = u32::try_from(vector.iov_len)
    {
        return opcode::Write::new(file, vector.iov_base.cast(), length).rw_flags(libc::RWF_NOWAIT).build();
    }
    let count = u32::try_from(vectors.len()).unwrap_or(u32::MAX);
    opcode::Writev::new(file, vectors.as_ptr(), count).rw_flags(libc::RWF_NOWAIT).build()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::setsockopt;
    use nix::sys::socket::sockopt::SndBuf;

    use super::*;

    fn vector(bytes: &[u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
    }

    /// Returns a queue that is a socket, which keeps the boundaries of frames, and its other end.
    fn queue() -> (TapQueue, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        // Room for a few frames.
        setsockopt(&near, SndBuf, &1).unwrap();
        (TapQueue::new(File::from(OwnedFd::from(near))), far)
    }

    fn ready() -> BatchWriter {
        let mut writer = BatchWriter::new(args::IoUring::Auto);
        assert_eq!((0..100).filter(|_| !writer.is_ready()).count(), 16);
        writer
    }

    #[test]
    fn frames_are_written_in_order_and_none_blocks() {
        let (tap, far) = queue();
        let mut writer = ready();
        let bytes: Vec<[u8; 2]> = (0..64).map(|number| [number, number + 1]).collect();
        // Every other frame consists of two pieces.
        let frames: Vec<Vec<_>> = bytes
            .iter()
            .map(|bytes| match bytes[0] % 2 {
                0 => vec![vector(bytes)],
                _ => bytes.chunks(1).map(vector).collect(),
            })
            .collect();
        // SAFETY: the vectors are `bytes`.
        let sent = unsafe { writer.send(&tap, frames.iter().map(Vec::as_slice)) }.to_vec();
        // The socket accepts a few, and has no room for the others.
        let done = sent.iter().take_while(|sent| **sent == Sent::Done).count();
        assert!((1..64).contains(&done), "{sent:?}");
        assert!(sent[done..].iter().all(|sent| *sent == Sent::Full), "{sent:?}");
        for expected in &bytes[..done] {
            let mut frame = [0; 3];
            let length = far.recv(&mut frame).unwrap();
            assert_eq!(frame[..length], *expected);
        }
        far.recv(&mut [0]).unwrap_err();
        assert!(writer.is_ready());
    }

    #[test]
    fn no_other_operation_is_allowed() {
        let mut ring = create().unwrap();
        // SAFETY: the operation refers to no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
        ring.submitter().register_files(&[0]).unwrap_err();
    }

    #[test]
    fn an_instance_that_fails_is_not_used_again() {
        let (tap, _far) = queue();
        let mut writer = ready();
        let frames = [[vector(b"ab")], [vector(b"cd")]];
        // The kernel refuses other threads.
        std::thread::scope(|scope| {
            let frames = SendVectors(&frames);
            let (writer, tap) = (&mut writer, &tap);
            scope.spawn(move || {
                let SendVectors(frames) = { frames };
                // SAFETY: the vectors are constants.
                let sent = unsafe { writer.send(tap, frames.iter().map(|frame| &frame[..])) };
                assert_eq!(sent, [Sent::Interrupted; 2]);
            });
        });
        assert!(!writer.is_ready());
    }

    struct SendVectors<'a>(&'a [[libc::iovec; 1]]);

    // SAFETY: the vectors point to constants.
    unsafe impl Send for SendVectors<'_> {}
}
