//! The front-end's end of a vhost-user socket. Sends any bytes and descriptors, checks replies, and has a helper for
//! each message that a well-behaved front-end sends.
#![expect(unsafe_code, reason = "owns the descriptors that come with replies")]

use std::cell::Cell;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use super::dirty_log::DirtyLog;
use super::inflight::Inflight;
use super::memory::{GuestMemory, Region};
use super::queue::RingAddresses;
use super::wire::{HEADER_SIZE, Message, NEED_REPLY, NO_FD, REPLY, VERSION, request, u16_at, u32_at, u64_at};

/// How long to wait for a reply. Only catches a back-end that hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A reply, as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request that it answers.
    pub request: u32,
    /// Its flags.
    pub flags: u32,
    /// The bytes after its header.
    pub payload: Vec<u8>,
}

/// A connection to a back-end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Request an acknowledgement of every message that has no reply, and check it (`NEED_REPLY`).
    pub acknowledged: bool,
    /// Close the socket after this many more bytes are sent, even in the middle of a message.
    pub cut_after: Cell<Option<usize>>,
}

impl Connection {
    /// Connects to a listening back-end.
    ///
    /// # Errors
    /// Returns an error if the back-end does not listen at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        Self::new(stream)
    }

    /// Uses a connected socket.
    ///
    /// # Errors
    /// Returns an error if the timeouts of the socket cannot be set.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, acknowledged: false, cut_after: Cell::new(None) })
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Checks that the back-end has sent nothing and has not closed the connection.
    ///
    /// # Errors
    /// Returns an error if the back-end has done either.
    pub fn check_quiet(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        ensure!(
            poll(&mut fds, PollTimeout::ZERO)? == 0,
            "unexpected event on the front-end's socket: {:?}",
            fds[0].revents()
        );
        Ok(())
    }

    /// Sends these bytes, with descriptors attached to the first of them.
    ///
    /// # Errors
    /// Returns an error if the socket cannot be written: `EPIPE` or `ECONNRESET` if the back-end has closed the
    /// connection.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let mut rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let mut rest = bytes;
        let cut = self.cut_after.get().filter(|&left| left <= bytes.len());
        match (cut, self.cut_after.get()) {
            (Some(left), _) => rest = &bytes[..left],
            (None, Some(left)) => self.cut_after.set(Some(left - bytes.len())),
            (None, None) => {}
        }
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_NOSIGNAL;
            let socket = self.stream.as_raw_fd();
            let sent = sendmsg::<UnixAddr>(socket, &[IoSlice::new(rest)], rights, flags, None)?;
            rest = &rest[sent..];
            rights = &[];
        }
        if cut.is_some() {
            self.stream.shutdown(Shutdown::Both)?;
            return Err(ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Returns the errors of [`Self::send_bytes`].
    pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&message.encode(), fds)
    }

    /// Waits for the next reply.
    ///
    /// # Errors
    /// Returns an error if the back-end closes the connection or sends anything but a valid reply.
    pub fn receive(&self) -> Result<Reply> {
        self.try_receive()?.context("the back-end has closed the connection")
    }

    /// Waits for the next reply. Returns `None` if the back-end closes the connection instead.
    ///
    /// # Errors
    /// Returns an error if the back-end sends anything but a valid reply.
    pub fn try_receive(&self) -> Result<Option<Reply>> {
        let mut header = [0; HEADER_SIZE];
        match (&self.stream).read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if is_closed(&error) => return Ok(None),
            Err(error) => return Err(error).context("cannot read a reply"),
        }
        let number = |offset| u32_at(&header, offset).unwrap_or_default();
        let (request, flags, size) = (number(0), number(4), number(8));
        ensure!(flags & !NEED_REPLY == VERSION | REPLY, "reply with flags {flags:#x}");
        ensure!(size <= 4096, "reply of {size} bytes");
        let mut payload = vec![0; usize::try_from(size)?];
        (&self.stream).read_exact(&mut payload).context("truncated reply")?;
        Ok(Some(Reply { request, flags, payload }))
    }

    /// Sends a message whose reply comes with a descriptor. Returns the reply's payload and the descriptor.
    ///
    /// # Errors
    /// Returns an error if there is no reply, a reply to another request, or no descriptor.
    pub fn ask_fd(&self, message: &Message) -> Result<(Vec<u8>, OwnedFd)> {
        self.send(message, &[])?;
        let mut header = [0; HEADER_SIZE];
        let mut space = nix::cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_PEEK;
        // Peeking takes the descriptor, which comes with the first byte. The bytes are read below.
        let received = recvmsg::<UnixAddr>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags)
            .context("cannot read a reply")?;
        let mut fds = received.cmsgs()?.filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = fds.next().and_then(|fds| fds.first().copied()).context("reply without a descriptor")?;
        // SAFETY: the descriptor was just received and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let reply = self.receive()?;
        ensure!(reply.request == message.request, "{reply:?} to request {}", message.request);
        Ok((reply.payload, fd))
    }

    /// Waits until the back-end closes the connection.
    ///
    /// # Errors
    /// Returns an error if the back-end sends something first.
    pub fn wait_closed(&self) -> Result<()> {
        match self.try_receive()? {
            None => Ok(()),
            Some(reply) => bail!("the back-end answered {reply:?} instead of closing the connection"),
        }
    }

    /// Sends a message that has a reply. Returns the reply's payload.
    ///
    /// # Errors
    /// Returns an error if there is no reply, or a reply to another request.
    pub fn ask(&self, message: &Message) -> Result<Vec<u8>> {
        self.ask_with(message, &[])
    }

    /// As [`Self::ask`], with descriptors.
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn ask_with(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>> {
        self.send(message, fds)?;
        let reply = self.receive().with_context(|| format!("request {}", message.request))?;
        ensure!(reply.request == message.request, "{reply:?} to request {}", message.request);
        Ok(reply.payload)
    }

    /// Sends a message whose reply is a 64-bit number. Returns that number.
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn ask_u64(&self, message: &Message) -> Result<u64> {
        let payload = self.ask(message)?;
        ensure!(payload.len() == 8, "reply of {} bytes to request {}", payload.len(), message.request);
        u64_at(&payload, 0).context("short reply")
    }

    /// Sends a message and requests its acknowledgement. Returns the acknowledgement's value: 0 means success.
    ///
    /// # Errors
    /// Returns an error if there is no acknowledgement.
    pub fn acknowledge(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<u64> {
        self.send(&message.clone().with_need_reply(), fds)?;
        let reply = self.receive().with_context(|| format!("request {}", message.request))?;
        ensure!(reply.request == message.request, "{reply:?} to request {}", message.request);
        ensure!(reply.payload.len() == 8, "{reply:?} is not an acknowledgement");
        u64_at(&reply.payload, 0).context("short reply")
    }

    /// Sends a message that has no reply. With [`Self::acknowledged`], waits for its acknowledgement.
    ///
    /// # Errors
    /// Returns an error if the message cannot be sent, is not acknowledged, or is refused.
    pub fn tell(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.acknowledged {
            let answer = self.acknowledge(message, fds)?;
            ensure!(answer == 0, "request {} was refused ({answer})", message.request);
        } else {
            self.send(message, fds).with_context(|| format!("request {}", message.request))?;
        }
        Ok(())
    }

    /// `GET_FEATURES`. Also serves as a barrier: when it returns, the back-end has handled all earlier messages.
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn get_features(&self) -> Result<u64> {
        self.ask_u64(&Message::empty(request::GET_FEATURES))
    }

    /// `SET_FEATURES`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.tell(&Message::u64(request::SET_FEATURES, features), &[])
    }

    /// `GET_PROTOCOL_FEATURES`
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn get_protocol_features(&self) -> Result<u64> {
        self.ask_u64(&Message::empty(request::GET_PROTOCOL_FEATURES))
    }

    /// `SET_PROTOCOL_FEATURES`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.tell(&Message::u64(request::SET_PROTOCOL_FEATURES, features), &[])
    }

    /// `SET_OWNER`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_owner(&self) -> Result<()> {
        self.tell(&Message::empty(request::SET_OWNER), &[])
    }

    /// `GET_QUEUE_NUM`
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn get_queue_num(&self) -> Result<u64> {
        self.ask_u64(&Message::empty(request::GET_QUEUE_NUM))
    }

    /// `GET_CONFIG`: `length` bytes of the configuration space from `offset`.
    ///
    /// # Errors
    /// Returns an error if the reply has another size or another range.
    pub fn get_config(&self, offset: u32, length: u32) -> Result<Vec<u8>> {
        let payload = self.ask(&Message::get_config(offset, length))?;
        ensure!(payload.len() == 12 + usize::try_from(length)?, "configuration of {} bytes", payload.len());
        ensure!(u32_at(&payload, 0) == Some(offset) && u32_at(&payload, 4) == Some(length), "wrong range");
        Ok(payload[12..].to_vec())
    }

    /// `SET_MEM_TABLE` with all regions of a guest's memory.
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_memory_table(&self, memory: &GuestMemory) -> Result<()> {
        let places: Vec<_> = memory.regions().iter().map(|region| region.place).collect();
        let fds: Vec<_> = memory.regions().iter().map(Region::file).collect();
        self.tell(&Message::memory_table(&places), &fds)
    }

    /// `ADD_MEM_REG`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn add_memory_region(&self, region: &Region) -> Result<()> {
        self.tell(&Message::single_region(request::ADD_MEM_REG, &region.place), &[region.file()])
    }

    /// `REM_MEM_REG`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn remove_memory_region(&self, region: &Region) -> Result<()> {
        self.tell(&Message::single_region(request::REM_MEM_REG, &region.place), &[])
    }

    /// `SET_VRING_NUM`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_num(&self, index: u32, size: u16) -> Result<()> {
        self.tell(&Message::vring_state(request::SET_VRING_NUM, index, size.into()), &[])
    }

    /// `SET_VRING_ADDR`, for guest addresses.
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_addresses(&self, index: u32, memory: &GuestMemory, rings: RingAddresses) -> Result<()> {
        self.set_logged_vring_addresses(index, memory, rings, None)
    }

    /// `SET_VRING_ADDR`, for guest addresses; with `VRING_F_LOG` if the back-end shall log its writes to the used ring.
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_logged_vring_addresses(
        &self,
        index: u32,
        memory: &GuestMemory,
        rings: RingAddresses,
        log: Option<u64>,
    ) -> Result<()> {
        let rings =
            [rings.descriptors, rings.used, rings.available].map(|address| memory.user_address(address));
        self.tell(&Message::logged_vring_addresses(index, rings, log), &[])
    }

    /// `GET_INFLIGHT_FD`: requests a region for `queues` vrings of `entries` descriptors.
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask_fd`], and an error if the region has other dimensions or cannot be mapped.
    pub fn get_inflight(&self, queues: u16, entries: u16) -> Result<Inflight> {
        let request = request::GET_INFLIGHT_FD;
        let (payload, file) = self.ask_fd(&Message::inflight(request, 0, 0, queues, entries))?;
        let number = |offset| u64_at(&payload, offset).context("short reply");
        let dimensions = (u16_at(&payload, 16), u16_at(&payload, 18));
        ensure!(dimensions == (Some(queues), Some(entries)), "region for {dimensions:?}");
        Inflight::new(file, number(0)?, number(8)?, queues, entries)
    }

    /// `SET_INFLIGHT_FD`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_inflight(&self, inflight: &Inflight) -> Result<()> {
        self.tell(&inflight.message(), &[inflight.file()])
    }

    /// `SET_LOG_BASE`
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`].
    pub fn set_log_base(&self, log: &DirtyLog) -> Result<()> {
        self.ask_with(&log.message(), &[log.file()])?;
        Ok(())
    }

    /// `SET_VRING_BASE`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_base(&self, index: u32, base: u16) -> Result<()> {
        self.tell(&Message::vring_state(request::SET_VRING_BASE, index, base.into()), &[])
    }

    /// `GET_VRING_BASE`: stops the vring. Returns its next available index.
    ///
    /// # Errors
    /// Returns the errors of [`Self::ask`], and an error if the reply is about another vring.
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let payload = self.ask(&Message::vring_state(request::GET_VRING_BASE, index, 0))?;
        ensure!(
            payload.len() == 8 && u32_at(&payload, 0) == Some(index),
            "invalid base of vring {index}: {payload:?}"
        );
        u32_at(&payload, 4).context("short reply")
    }

    /// `SET_VRING_KICK` with an eventfd, or without one, in which case the back-end polls.
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_kick(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(request::SET_VRING_KICK, index, fd)
    }

    /// `SET_VRING_CALL` with an eventfd, or without one, in which case the driver polls.
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_call(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(request::SET_VRING_CALL, index, fd)
    }

    fn set_vring_fd(&self, request: u32, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let without = if fd.is_some() { 0 } else { NO_FD };
        self.tell(&Message::u64(request, u64::from(index) | without), fd.as_slice())
    }

    /// `SET_VRING_ENABLE`
    ///
    /// # Errors
    /// Returns the errors of [`Self::tell`].
    pub fn set_vring_enable(&self, index: u32, enabled: bool) -> Result<()> {
        self.tell(&Message::vring_state(request::SET_VRING_ENABLE, index, enabled.into()), &[])
    }
}

/// Whether an error means that the other end is closed.
fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
        Message::new(request, payload.to_vec()).with_flags(VERSION | REPLY).encode()
    }

    #[test]
    fn a_request_gets_its_reply() {
        let (connection, mut back_end) = pair();
        let server = thread::spawn(move || {
            let mut request = [0; HEADER_SIZE];
            back_end.read_exact(&mut request).unwrap();
            assert_eq!(request, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            back_end.write_all(&reply(request::GET_FEATURES, &5u64.to_le_bytes())).unwrap();
        });
        assert_eq!(connection.get_features().unwrap(), 5);
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_or_a_reply_to_another_request_is_an_error() {
        let (mut connection, mut back_end) = pair();
        connection.acknowledged = true;
        back_end.write_all(&reply(request::SET_OWNER, &1u64.to_le_bytes())).unwrap();
        assert!(connection.set_owner().unwrap_err().to_string().contains("refused"));
        back_end.write_all(&reply(request::SET_FEATURES, &0u64.to_le_bytes())).unwrap();
        connection.set_owner().unwrap_err();
    }

    #[test]
    fn a_closed_connection_is_distinguished_from_a_reply() {
        let (connection, mut back_end) = pair();
        back_end.write_all(&reply(request::SET_OWNER, &[])).unwrap();
        connection.wait_closed().unwrap_err();
        drop(back_end);
        connection.wait_closed().unwrap();
    }
}
