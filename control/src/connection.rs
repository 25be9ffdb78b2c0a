//! One client of the control server: its half-read line and its half-written reply.
//!
//! At most one line is read ahead and at most one reply is held: a client that does not read its replies is not
//! read from either, so what it can make the server hold is bounded.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use baton_protocol::control::MAX_LINE;

use crate::later::Later;

/// What a client's bytes amount to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A whole line, without its newline.
    Whole(Vec<u8>),
    /// A line longer than [`MAX_LINE`]; the rest of it will be skipped.
    TooLong,
}

/// One client's connection, non-blocking.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
    /// Inside a line that was too long, until its newline.
    skipping: bool,
    /// The client will send no more.
    ended: bool,
    /// The answer that the client waits for.
    later: Option<Later>,
}

impl Connection {
    /// Takes a client's stream over.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            skipping: false,
            ended: false,
            later: None,
        })
    }

    /// Whether a reply is still to be written.
    pub(crate) fn has_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// Whether there is nothing left to do for this client.
    pub(crate) fn is_over(&self) -> bool {
        self.ended && self.input.is_empty() && !self.has_output() && self.later.is_none()
    }

    /// The answer that the client waits for; nothing more is read from it before that has come.
    pub(crate) fn later(&self) -> Option<&Later> {
        self.later.as_ref()
    }

    /// Lets the client wait for an answer, or no longer.
    pub(crate) fn set_later(&mut self, later: Option<Later>) {
        self.later = later;
    }

    /// Reads what is there, up to one line's worth.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        while !self.ended && self.input.len() <= MAX_LINE {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the next line out of what was read. A last line need not end in a newline.
    pub(crate) fn next_line(&mut self) -> Option<Line> {
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let mut line: Vec<u8> = self.input.drain(..=end).collect();
            line.pop();
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            return Some(if line.len() > MAX_LINE { Line::TooLong } else { Line::Whole(line) });
        }
        if self.skipping {
            self.input.clear();
        } else if self.input.len() > MAX_LINE {
            self.input.clear();
            self.skipping = true;
            return Some(Line::TooLong);
        } else if self.ended && !self.input.is_empty() {
            return Some(Line::Whole(std::mem::take(&mut self.input)));
        }
        None
    }

    /// Makes `reply` the next thing to write; the one before must have gone out.
    pub(crate) fn set_reply(&mut self, reply: Vec<u8>) {
        debug_assert!(!self.has_output());
        self.output = reply;
        self.written = 0;
    }

    /// Writes as much of the reply as the client takes now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while self.has_output() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    #[test]
    fn lines_come_out_one_by_one() {
        let (mut connection, mut client) = pair();
        client.write_all(b"one\ntwo\nthr").unwrap();
        connection.fill().unwrap();
        assert_eq!(connection.next_line(), Some(Line::Whole(b"one".to_vec())));
        assert_eq!(connection.next_line(), Some(Line::Whole(b"two".to_vec())));
        assert_eq!(connection.next_line(), None);
        client.write_all(b"ee\n").unwrap();
        connection.fill().unwrap();
        assert_eq!(connection.next_line(), Some(Line::Whole(b"three".to_vec())));
    }

    #[test]
    fn the_last_line_needs_no_newline() {
        let (mut connection, mut client) = pair();
        client.write_all(b"last").unwrap();
        drop(client);
        connection.fill().unwrap();
        assert!(!connection.is_over());
        assert_eq!(connection.next_line(), Some(Line::Whole(b"last".to_vec())));
        assert!(connection.is_over());
    }

    #[test]
    fn an_endless_line_is_reported_once_and_skipped() {
        let (mut connection, client) = pair();
        let writer = std::thread::spawn(move || {
            let mut client = client;
            client.write_all(&vec![b'x'; 10 * MAX_LINE]).unwrap();
            client.write_all(b"\nnext\n").unwrap();
        });
        let mut lines = Vec::new();
        while !connection.is_over() {
            connection.fill().unwrap();
            assert!(connection.input.len() <= MAX_LINE + 4096);
            lines.extend(std::iter::from_fn(|| connection.next_line()));
        }
        writer.join().unwrap();
        assert_eq!(lines, [Line::TooLong, Line::Whole(b"next".to_vec())]);
    }
}
