//! Pipelines messages about many rings during a guest's blackout: sends them without waiting for the reply to each, so
//! that the guest waits for few round trips instead of one per ring.
//!
//! The protocol allows that: the connection is a stream, and a back-end reads messages in order. No more than
//! [`WINDOW`] replies are outstanding, because a back-end that cannot send its replies stops reading.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost::vhost_user::Error;
use vhost::vhost_user::message::FrontendReq;

use super::frontend::ConnectionError;

/// How many replies may be outstanding.
const WINDOW: usize = 32;
/// Bytes of a header: request, flags, size.
const HEADER: usize = 12;
/// Bytes of every body here, in requests and replies.
const BODY: u32 = 8;
/// A message's length.
const LENGTH: usize = HEADER + BODY as usize;
/// In the flags: version 1 of the protocol.
const VERSION: u32 = 1;
/// In the flags: this is a reply.
const REPLY: u32 = 1 << 2;
/// In the flags: an acknowledgement is requested.
const NEED_REPLY: u32 = 1 << 3;

/// A reply that is outstanding.
#[derive(Debug)]
struct PendingReply {
    request: FrontendReq,
    name: &'static str,
    /// The ring whose base is expected; `None` for an acknowledgement.
    ring: Option<usize>,
}

/// Messages whose replies are outstanding. [`Pipeline::finish`] must precede any other message.
#[derive(Debug)]
pub struct Pipeline<'a> {
    socket: &'a UnixStream,
    reply_ack: bool,
    pending: VecDeque<PendingReply>,
    bases: Vec<(usize, u32)>,
}

impl<'a> Pipeline<'a> {
    /// Creates a pipeline on a connection. `reply_ack` says whether that feature is negotiated.
    pub fn new(socket: &'a UnixStream, reply_ack: bool) -> Self {
        Self { socket, reply_ack, pending: VecDeque::new(), bases: Vec::new() }
    }

    /// Sends `GET_VRING_BASE`.
    pub fn get_base(&mut self, ring: usize) -> Result<(), ConnectionError> {
        self.send(FrontendReq::GET_VRING_BASE, "GET_VRING_BASE", ring_state(ring, 0), None, Some(ring))
    }

    /// Sends `SET_VRING_BASE`.
    pub fn set_base(&mut self, ring: usize, base: u16) -> Result<(), ConnectionError> {
        let body = ring_state(ring, u32::from(base));
        self.send(FrontendReq::SET_VRING_BASE, "SET_VRING_BASE", body, None, None)
    }

    /// Sends `SET_VRING_KICK`.
    pub fn set_kick(&mut self, ring: usize, kick: BorrowedFd<'_>) -> Result<(), ConnectionError> {
        let body = u64::try_from(ring).unwrap_or(u64::MAX).to_ne_bytes();
        self.send(FrontendReq::SET_VRING_KICK, "SET_VRING_KICK", body, Some(kick), None)
    }

    fn send(
        &mut self,
        request: FrontendReq,
        name: &'static str,
        body: [u8; BODY as usize],
        fd: Option<BorrowedFd<'_>>,
        ring: Option<usize>,
    ) -> Result<(), ConnectionError> {
        if self.pending.len() == WINDOW {
            self.receive_reply()?;
        }
        let acknowledged = ring.is_none() && self.reply_ack;
        let flags = VERSION | if acknowledged { NEED_REPLY } else { 0 };
        let header = [request as u32, flags, BODY].map(u32::to_ne_bytes);
        let message = [IoSlice::new(header.as_flattened()), IoSlice::new(&body)];
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &message, rights, MsgFlags::MSG_NOSIGNAL, None);
        match sent {
            Ok(LENGTH) => {}
            Ok(_) => return Err(failed(name, Error::PartialMessage)),
            Err(errno) => return Err(failed(name, Error::SocketBroken(errno.into()))),
        }
        if acknowledged || ring.is_some() {
            self.pending.push_back(PendingReply { request, name, ring });
        }
        Ok(())
    }

    /// Waits for the next reply.
    fn receive_reply(&mut self) -> Result<(), ConnectionError> {
        let Some(PendingReply { request, name, ring }) = self.pending.pop_front() else { return Ok(()) };
        let mut answer = [0; LENGTH];
        self.socket.read_exact(&mut answer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => failed(name, Error::Disconnected),
            _ => failed(name, Error::SocketBroken(error)),
        })?;
        let mut words = [0; LENGTH / 4];
        for (word, bytes) in words.iter_mut().zip(answer.as_chunks().0) {
            *word = u32::from_ne_bytes(*bytes);
        }
        let [code, flags, BODY, low, high] = words else { return Err(failed(name, Error::InvalidMessage)) };
        if code != request as u32 || flags & (VERSION | REPLY) != VERSION | REPLY {
            return Err(failed(name, Error::InvalidMessage));
        }
        match ring {
            Some(ring) if u32::try_from(ring) == Ok(low) => self.bases.push((ring, high)),
            Some(_) => return Err(failed(name, Error::InvalidMessage)),
            None if (low, high) == (0, 0) => {}
            None => return Err(failed(name, Error::BackendInternalError)),
        }
        Ok(())
    }

    /// Waits for all replies. Returns the requested bases, in the order of the requests.
    pub fn finish(mut self) -> Result<Vec<(usize, u32)>, ConnectionError> {
        while !self.pending.is_empty() {
            self.receive_reply()?;
        }
        Ok(self.bases)
    }
}

/// Encodes the body of a message about a ring's state.
fn ring_state(ring: usize, value: u32) -> [u8; BODY as usize] {
    let ring = u32::try_from(ring).unwrap_or(u32::MAX).to_ne_bytes();
    let value = value.to_ne_bytes();
    let mut body = [0; BODY as usize];
    body[..4].copy_from_slice(&ring);
    body[4..].copy_from_slice(&value);
    body
}

fn failed(message: &'static str, error: Error) -> ConnectionError {
    ConnectionError::Message { message, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event;
    use crate::vhost_user::fake_backend::FakeBackend;

    /// More than [`WINDOW`], so that replies are read in between.
    const RINGS: usize = 100;

    fn serve(backend: FakeBackend, exchange: impl FnOnce(&UnixStream)) -> Vec<String> {
        let (here, there) = UnixStream::pair().unwrap();
        let serving = backend.serve(there);
        exchange(&here);
        drop(here);
        serving.finish().log
    }

    #[test]
    fn each_base_belongs_to_its_ring() {
        let mut backend = FakeBackend::new(RINGS as u64);
        backend.bases = (0..100).map(|ring| 3 * ring).collect();
        let log = serve(backend, |socket| {
            let mut pipeline = Pipeline::new(socket, false);
            (0..RINGS).try_for_each(|ring| pipeline.get_base(ring)).unwrap();
            let bases = pipeline.finish().unwrap();
            assert_eq!(bases, (0..100).map(|ring| (ring as usize, 3 * ring)).collect::<Vec<_>>());
        });
        assert_eq!(log.len(), RINGS);
    }

    #[test]
    fn descriptors_go_with_their_messages() {
        let kick = event::new().unwrap();
        let log = serve(FakeBackend::new(2), |socket| {
            let mut pipeline = Pipeline::new(socket, false);
            pipeline.set_base(1, 65535).unwrap();
            pipeline.set_kick(1, event::descriptor(&kick)).unwrap();
            pipeline.get_base(1).unwrap();
            pipeline.finish().unwrap();
        });
        assert_eq!(log, ["SET_VRING_BASE 1 65535", "SET_VRING_KICK 1", "GET_VRING_BASE 1"]);
    }

    fn answered(answer: [u32; 5]) -> ConnectionError {
        let (here, mut there) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut there, answer.map(u32::to_ne_bytes).as_flattened()).unwrap();
        let mut pipeline = Pipeline::new(&here, true);
        pipeline.set_base(3, 0).unwrap();
        pipeline.finish().unwrap_err()
    }

    #[test]
    fn refusal_and_invalid_reply_are_distinct_errors() {
        let request = FrontendReq::SET_VRING_BASE as u32;
        let refused = answered([request, VERSION | REPLY, 8, 1, 0]);
        assert!(matches!(
            refused,
            ConnectionError::Message {
                message: "SET_VRING_BASE",
                source: vhost::Error::VhostUserProtocol(Error::BackendInternalError)
            }
        ));
        for invalid in [
            [request + 1, VERSION | REPLY, 8, 0, 0],
            [request, VERSION, 8, 0, 0],
            [request, REPLY, 8, 0, 0],
            [request, VERSION | REPLY, 12, 0, 0],
        ] {
            let error = answered(invalid);
            assert!(
                matches!(
                    error,
                    ConnectionError::Message {
                        source: vhost::Error::VhostUserProtocol(Error::InvalidMessage),
                        ..
                    }
                ),
                "{error:?}"
            );
        }
    }

    #[test]
    fn reply_about_another_ring_is_rejected() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let request = FrontendReq::GET_VRING_BASE as u32;
        let answer = [request, VERSION | REPLY, 8, 1, 7].map(u32::to_ne_bytes);
        std::io::Write::write_all(&mut there, answer.as_flattened()).unwrap();
        let mut pipeline = Pipeline::new(&here, true);
        pipeline.get_base(0).unwrap();
        pipeline.finish().unwrap_err();
    }
}
