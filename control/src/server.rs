//! The server of a control socket: a thread that owns the socket and all its clients, and multiplexes them with
//! poll(2).
//!
//! Requests are handled one at a time, in the order in which they arrive whole. Nobody can hold up the others: no
//! read or write blocks, a client's buffers are bounded, and where [`MAX_CLIENTS`] are connected, a new one takes
//! the place of the one that has been silent for longest.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_protocol::control::{MAX_LINE, Refusal, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::connection::{Connection, Line};
use crate::later::{Answer, Later, Outcome};
use crate::socket_path::BoundSocket;

/// How many clients may be connected at once.
pub const MAX_CLIENTS: usize = 16;

/// How long [`ControlServer::stop`] waits for clients to take the replies already made.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// How long the listener is left alone after the process has run out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running control server.
#[derive(Debug)]
pub struct ControlServer {
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Starts the thread. `handler` is called on it for every request, and gives the reply's JSON object, or will have
    /// it given later; it must not stop this server itself.
    ///
    /// # Errors
    /// When the thread or its wake-up descriptor cannot be created.
    pub fn start<H, A>(socket: BoundSocket, mut handler: H) -> io::Result<Self>
    where
        H: FnMut(Request) -> A + Send + 'static,
        A: Into<Answer>,
    {
        let handler = move |request| handler(request).into();
        socket.listener().set_nonblocking(true)?;
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let server = Server { socket, wake: Arc::clone(&wake), handler, connections: Vec::new() };
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || server.run())?;
        Ok(Self { wake, thread: Some(thread) })
    }

    /// Stops the thread once the replies already made have gone out, and unlinks the socket. Dropping does the same.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if let Err(errno) = self.wake.write(1) {
            tracing::error!(%errno, "cannot stop the control server");
            return;
        }
        if thread.join().is_err() {
            tracing::error!("the control server had panicked");
        }
    }
}

/// What the thread owns.
struct Server<H> {
    socket: BoundSocket,
    wake: Arc<EventFd>,
    handler: H,
    /// In the order of their last activity, the most silent first.
    connections: Vec<Connection>,
}

impl<H> Server<H>
where
    H: FnMut(Request) -> Answer,
{
    fn run(mut self) {
        let mut accepting = true;
        loop {
            let timeout = if accepting { PollTimeout::NONE } else { timeout(ACCEPT_PAUSE) };
            let ready = match self.wait(accepting, timeout) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "the control server cannot poll");
                    break;
                }
            };
            if ready.stop {
                break;
            }
            self.serve_ready(&ready.connections);
            accepting = !ready.listener || self.accept();
        }
        self.flush_all();
    }

    /// Waits for something to do.
    fn wait(&self, accepting: bool, timeout: PollTimeout) -> Result<Ready, Errno> {
        let listener_events = if accepting { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.listener().as_fd(), listener_events),
        ];
        fds.extend(self.connections.iter().map(|connection| {
            if let Some(later) = connection.later() {
                return PollFd::new(later.as_fd(), PollFlags::POLLIN);
            }
            let events = if connection.has_output() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
            PollFd::new(connection.as_fd(), events)
        }));
        poll(&mut fds, timeout)?;
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        Ok(Ready {
            stop: ready.next().unwrap_or(false),
            listener: ready.next().unwrap_or(false),
            connections: ready.collect(),
        })
    }

    /// Serves the clients that are ready, and moves them behind the silent ones.
    fn serve_ready(&mut self, ready: &[bool]) {
        let mut active = Vec::new();
        let mut silent = Vec::new();
        for (connection, &ready) in std::mem::take(&mut self.connections).into_iter().zip(ready) {
            if ready { &mut active } else { &mut silent }.push(connection);
        }
        self.connections = silent;
        for mut connection in active {
            match serve(&mut connection, &mut self.handler) {
                Ok(()) if connection.is_over() => {}
                Ok(()) => self.connections.push(connection),
                Err(error) => tracing::debug!(%error, "a control client is gone"),
            }
        }
    }

    /// Takes the waiting clients in. False if the process has no descriptor left for them, and nobody's to take.
    fn accept(&mut self) -> bool {
        loop {
            match self.socket.listener().accept().and_then(|(stream, _)| Connection::new(stream)) {
                Ok(connection) => {
                    if self.connections.len() >= MAX_CLIENTS {
                        // Not one that waits for an answer, unless all do.
                        let silent = self.connections.iter().position(|other| other.later().is_none());
                        self.connections.remove(silent.unwrap_or(0));
                    }
                    self.connections.push(connection);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    crate::limited!(warn, %error, "cannot accept a control client");
                    if self.connections.is_empty() {
                        return false;
                    }
                    self.connections.remove(0);
                }
            }
        }
    }

    /// Gives the clients [`FLUSH_TIME`] to take what they have been answered.
    fn flush_all(&mut self) {
        let deadline = Instant::now() + FLUSH_TIME;
        self.connections.iter_mut().for_each(keep_promise);
        loop {
            self.connections.retain_mut(|connection| connection.flush().is_ok() && connection.has_output());
            let left = deadline.saturating_duration_since(Instant::now());
            if self.connections.is_empty() || left.is_zero() {
                return;
            }
            let mut fds: Vec<_> = self
                .connections
                .iter()
                .map(|connection| PollFd::new(connection.as_fd(), PollFlags::POLLOUT))
                .collect();
            if let Err(errno) = poll(&mut fds, timeout(left))
                && errno != Errno::EINTR
            {
                return;
            }
        }
    }
}

/// What poll(2) reported.
struct Ready {
    stop: bool,
    listener: bool,
    /// One for each connection, in their order.
    connections: Vec<bool>,
}

/// Does what can be done for a client without waiting.
fn serve<H>(connection: &mut Connection, handler: &mut H) -> io::Result<()>
where
    H: FnMut(Request) -> Answer,
{
    keep_promise(connection);
    connection.flush()?;
    if connection.has_output() || connection.later().is_some() {
        return Ok(());
    }
    connection.fill()?;
    while let Some(line) = connection.next_line() {
        match answer_to(&line, handler) {
            Answer::Now(outcome) => connection.set_reply(encoded(&outcome)),
            Answer::Later(later) => {
                connection.set_later(Some(later));
                break;
            }
        }
        connection.flush()?;
        if connection.has_output() {
            break;
        }
    }
    Ok(())
}

/// Makes the answer that a client waits for, if it has come, the next thing to write.
fn keep_promise(connection: &mut Connection) {
    if let Some(outcome) = connection.later().and_then(Later::take) {
        connection.set_later(None);
        connection.set_reply(encoded(&outcome));
    }
}

/// The answer to one line.
fn answer_to<H>(line: &Line, handler: &mut H) -> Answer
where
    H: FnMut(Request) -> Answer,
{
    match line {
        Line::TooLong => Err(refusal(format!("a request may have at most {MAX_LINE} bytes"))).into(),
        Line::Whole(line) => match serde_json::from_slice(line) {
            Ok(request) => handler(request),
            Err(error) => Err(refusal(format!("not a request: {error}"))).into(),
        },
    }
}

/// An outcome as it is sent, with its newline.
fn encoded(outcome: &Outcome) -> Vec<u8> {
    let encoded = match outcome {
        Ok(value) => serde_json::to_vec(value),
        Err(refusal) => serde_json::to_vec(refusal),
    };
    let mut reply = match encoded {
        Ok(reply) if reply.len() <= MAX_LINE => reply,
        Ok(_) => br#"{"error":"the reply is too long"}"#.to_vec(),
        Err(error) => {
            tracing::error!(%error, "a control reply cannot be encoded");
            br#"{"error":"the reply cannot be encoded"}"#.to_vec()
        }
    };
    reply.push(b'\n');
    reply
}

/// A time as poll(2) takes it.
fn timeout(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
}

fn refusal(error: String) -> Refusal {
    Refusal { error }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};

    use serde_json::json;

    use super::*;
    use crate::client::{ClientError, ControlClient};

    /// Answers `status`, and a long `stats`; refuses the rest.
    fn handler(request: Request) -> Result<serde_json::Value, Refusal> {
        match request {
            Request::Status => Ok(json!({"state": "waiting"})),
            Request::Stats => Ok(json!({"long": "x".repeat(MAX_LINE - 100)})),
            Request::Pause => Ok(json!({"too long": "x".repeat(MAX_LINE)})),
            other => Err(refusal(format!("{other:?} is not for this process"))),
        }
    }

    fn started() -> (tempfile::TempDir, PathBuf, ControlServer) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let server = ControlServer::start(BoundSocket::bind(&path).unwrap(), handler).unwrap();
        (directory, path, server)
    }

    fn exchange(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(request).unwrap();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap();
        reply
    }

    #[test]
    fn a_request_is_answered_in_one_line() {
        let (_directory, path, _server) = started();
        assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
    }

    #[test]
    fn a_bad_line_is_answered_and_the_next_one_served() {
        let (_directory, path, _server) = started();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"nonsense\n{\"command\":\"dance\"}\n\xff\n{\"command\":\"status\"}\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut replies = String::new();
        stream.read_to_string(&mut replies).unwrap();
        let replies: Vec<_> = replies.lines().collect();
        assert_eq!(replies.len(), 4, "{replies:?}");
        assert!(replies[..3].iter().all(|reply| reply.starts_with("{\"error\":")), "{replies:?}");
        assert_eq!(replies[3], "{\"state\":\"waiting\"}");
    }

    #[test]
    fn an_over_long_line_is_refused_and_the_next_one_served() {
        let (_directory, path, _server) = started();
        let mut request = vec![b'x'; MAX_LINE + 1];
        request.extend_from_slice(b"\n{\"command\":\"status\"}\n");
        let stream = UnixStream::connect(&path).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let thread = std::thread::spawn(move || writer.write_all(&request).unwrap());
        let mut lines = BufReader::new(stream).lines();
        assert!(lines.next().unwrap().unwrap().contains("at most 65536 bytes"));
        assert_eq!(lines.next().unwrap().unwrap(), "{\"state\":\"waiting\"}");
        thread.join().unwrap();
    }

    #[test]
    fn a_reply_that_would_be_too_long_is_an_error() {
        let (_directory, path, _server) = started();
        assert_eq!(exchange(&path, b"{\"command\":\"pause\"}\n"), "{\"error\":\"the reply is too long\"}\n");
    }

    #[test]
    fn a_silent_client_does_not_hold_up_others() {
        let (_directory, path, _server) = started();
        let mut silent = UnixStream::connect(&path).unwrap();
        silent.write_all(b"{\"comm").unwrap();
        let mut first = ControlClient::connect(&path).unwrap();
        let mut second = ControlClient::connect(&path).unwrap();
        for _ in 0..10 {
            assert_eq!(first.call(&Request::Status).unwrap()["state"], "waiting");
            assert_eq!(second.call(&Request::Status).unwrap()["state"], "waiting");
        }
        // And it is still being listened to.
        silent.write_all(b"and\":\"status\"}\n").unwrap();
        let mut reply = String::new();
        BufReader::new(silent).read_line(&mut reply).unwrap();
        assert_eq!(reply, "{\"state\":\"waiting\"}\n");
    }

    #[test]
    fn a_client_that_reads_nothing_does_not_hold_up_others() {
        let (_directory, path, _server) = started();
        let greedy = UnixStream::connect(&path).unwrap();
        greedy.set_nonblocking(true).unwrap();
        // Until neither side's buffers take any more: the server has stopped reading.
        let mut refused = 0;
        while refused < 3 {
            match nix::unistd::write(&greedy, b"{\"command\":\"stats\"}\n") {
                Ok(_) => refused = 0,
                Err(errno) => {
                    assert_eq!(errno, Errno::EAGAIN);
                    refused += 1;
                    exchange(&path, b"{\"command\":\"status\"}\n");
                }
            }
        }
        assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
    }

    #[test]
    fn the_most_silent_client_makes_room() {
        let (_directory, path, _server) = started();
        let mut kept = ControlClient::connect(&path).unwrap();
        let mut silent: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        // `kept` was the most silent, and lost its place to the last of these.
        let error = kept.call(&Request::Status).unwrap_err();
        assert!(matches!(error, ClientError::Closed | ClientError::Io(_)), "{error}");
        assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
        let mut end = [0];
        assert_eq!(silent[0].read(&mut end).unwrap(), 0);
    }

    #[test]
    fn an_answer_may_come_later_and_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let (promises, made) = std::sync::mpsc::channel();
        let answer = move |request| match request {
            Request::Pause => {
                let (promise, later) = crate::later::Promise::new().unwrap();
                promises.send(promise).unwrap();
                Answer::Later(later)
            }
            other => handler(other).into(),
        };
        let server = ControlServer::start(BoundSocket::bind(&path).unwrap(), answer).unwrap();
        let mut patient = BufReader::new(UnixStream::connect(&path).unwrap());
        patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"status\"}\n").unwrap();
        let promise = made.recv().unwrap();
        // Others are served, and more of them than there may be do not push this one out.
        let others: Vec<_> = (0..MAX_CLIENTS).map(|_| ControlClient::connect(&path).unwrap()).collect();
        for mut other in others.into_iter().rev().take(MAX_CLIENTS - 1) {
            other.call(&Request::Status).unwrap();
        }
        promise.keep(Ok(json!({"done": true})));
        let mut lines = [String::new(), String::new()];
        for line in &mut lines {
            patient.read_line(line).unwrap();
        }
        assert_eq!(lines, ["{\"done\":true}\n", "{\"state\":\"waiting\"}\n"]);

        // A promise that is not kept is answered, too; and one that was kept reaches its client at the very end.
        patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"pause\"}\n").unwrap();
        drop(made.recv().unwrap());
        let mut line = String::new();
        patient.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"error\":\"the request came to no end\"}\n");
        made.recv().unwrap().keep(Ok(json!({"last": true})));
        server.stop();
        line.clear();
        patient.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"last\":true}\n");
    }

    #[test]
    fn a_refusal_reaches_the_client_as_such() {
        let (_directory, path, _server) = started();
        let error = ControlClient::connect(&path).unwrap().call(&Request::Resume).unwrap_err();
        assert!(
            matches!(&error, ClientError::Refused(why) if why == "Resume is not for this process"),
            "{error}"
        );
    }

    #[test]
    fn stopping_flushes_what_was_answered_and_removes_the_socket() {
        let (_directory, path, server) = started();
        let mut stream = UnixStream::connect(&path).unwrap();
        // More replies than the socket's buffers hold: the server is in the middle of one when it is stopped.
        for _ in 0..100 {
            stream.write_all(b"{\"command\":\"stats\"}\n").unwrap();
        }
        let mut reader = BufReader::new(stream);
        let mut reply = String::new();
        reader.read_line(&mut reply).unwrap();
        let stopper = std::thread::spawn(move || server.stop());
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        stopper.join().unwrap();
        assert!(rest.ends_with('\n'), "a reply was cut off");
        assert!(!path.exists());
    }
}
