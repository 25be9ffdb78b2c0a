//! The server of a control socket: one thread accepts clients, and a thread for each client reads its requests and
//! writes the replies.
//!
//! So a client that is silent, reads no replies, or waits for a slow request holds up no other one. What a client can
//! make the server hold is bounded: one line and one reply. At most [`MAX_CLIENTS`] are connected; a new one takes the
//! place of the one that has been silent for longest.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

use baton_channel::bound_socket::BoundSocket;
use baton_protocol::control::{MAX_LINE, Refusal, Request};
use nix::sys::socket::{self, MsgFlags, send};

use crate::limited;
use crate::reply::Outcome;

/// How many clients may be connected at once.
pub const MAX_CLIENTS: usize = 16;

/// How long [`ControlServer::stop`] waits for clients to take the replies to the requests that they have made.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// How long the listener is left alone after a client could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running control server.
#[derive(Debug)]
pub struct ControlServer {
    socket: Arc<BoundSocket>,
    clients: Arc<Clients>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Starts the server. `handler` answers a request on its client's thread, so it may wait for another one.
    ///
    /// # Errors
    /// If the thread that accepts clients cannot be created.
    pub fn start<H>(socket: BoundSocket, handler: H) -> io::Result<Self>
    where
        H: Fn(Request) -> Outcome + Send + Sync + 'static,
    {
        let socket = Arc::new(socket);
        let clients = Arc::new(Clients::default());
        let acceptor = Acceptor {
            socket: Arc::clone(&socket),
            clients: Arc::clone(&clients),
            handler: Arc::new(handler),
        };
        let acceptor = Builder::new().name("control".to_owned()).spawn(move || acceptor.run())?;
        Ok(Self { socket, clients, acceptor: Some(acceptor) })
    }

    /// Stops serving once the replies to the requests already made have gone out, and unlinks the socket. Dropping does
    /// the same.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.clients.lock().stopping = true;
        self.clients.changed.notify_all();
        // Wakes the acceptor, whose accept(2) fails from now on.
        if let Err(errno) = socket::shutdown(self.socket.listener().as_raw_fd(), socket::Shutdown::Both) {
            tracing::error!(%errno, "cannot stop the control server");
            return;
        }
        if self.acceptor.take().is_some_and(|acceptor| acceptor.join().is_err()) {
            tracing::error!("the control server had panicked");
        }
        self.clients.flush();
    }
}

/// What the thread that accepts clients owns.
struct Acceptor<H> {
    socket: Arc<BoundSocket>,
    clients: Arc<Clients>,
    handler: Arc<H>,
}

impl<H> Acceptor<H>
where
    H: Fn(Request) -> Outcome + Send + Sync + 'static,
{
    fn run(self) {
        loop {
            let accepted = self.socket.listener().accept();
            if self.clients.lock().stopping {
                return;
            }
            if let Err(error) = accepted.and_then(|(stream, _)| self.serve(stream)) {
                limited!(warn, %error, "cannot accept a control client");
                // Frees a descriptor.
                self.clients.lock().drop_silent();
                sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Serves a client on a thread of its own.
    fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let stream = Arc::new(stream);
        if !self.clients.admit(&stream) {
            return Ok(());
        }
        let (clients, handler) = (Arc::clone(&self.clients), Arc::clone(&self.handler));
        let served = Arc::clone(&stream);
        let thread = Builder::new().name("control-client".to_owned()).spawn(move || {
            if let Err(error) = serve(&clients, &served, &*handler) {
                tracing::debug!(%error, "a control client is gone");
            }
            clients.leave(&served);
        });
        thread.map(drop).inspect_err(|_| self.clients.leave(&stream))
    }
}

/// The clients that are connected.
#[derive(Debug, Default)]
struct Clients {
    list: Mutex<List>,
    /// Signalled when a client is answered or leaves, and when the server stops.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct List {
    clients: Vec<Client>,
    stopping: bool,
}

#[derive(Debug)]
struct Client {
    stream: Arc<UnixStream>,
    /// When it connected, made its last request, or was answered.
    active: Instant,
    /// The handler has its request.
    waiting: bool,
}

impl List {
    /// Disconnects the client that has been silent for longest. `false` if there is none that waits for no answer.
    fn drop_silent(&mut self) -> bool {
        let silent = self.clients.iter().enumerate().filter(|(_, client)| !client.waiting);
        let Some((index, _)) = silent.min_by_key(|(_, client)| client.active) else { return false };
        // Ends the reads and writes of its thread.
        let _ = self.clients.remove(index).stream.shutdown(Shutdown::Both);
        true
    }

    fn make_room(&mut self) -> bool {
        self.clients.len() < MAX_CLIENTS || self.drop_silent()
    }
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a client in, as soon as there is room. `false` if the server stops.
    fn admit(&self, stream: &Arc<UnixStream>) -> bool {
        let full = |list: &mut List| !list.stopping && !list.make_room();
        let mut list = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        let admitted = !list.stopping;
        if admitted {
            list.clients.push(Client { stream: Arc::clone(stream), active: Instant::now(), waiting: false });
        }
        admitted
    }

    /// Notes that a client waits for an answer, or no longer. `false` if its next request is not to be served.
    fn set_waiting(&self, stream: &Arc<UnixStream>, waiting: bool) -> bool {
        let mut list = self.lock();
        let stopping = list.stopping;
        let client = list.clients.iter_mut().find(|client| Arc::ptr_eq(&client.stream, stream));
        let Some(client) = client.filter(|_| !stopping) else { return false };
        client.active = Instant::now();
        client.waiting = waiting;
        self.changed.notify_all();
        true
    }

    fn leave(&self, stream: &Arc<UnixStream>) {
        self.lock().clients.retain(|client| !Arc::ptr_eq(&client.stream, stream));
        self.changed.notify_all();
    }

    /// Gives the clients [`FLUSH_TIME`] to take the replies to the requests that they have made.
    fn flush(&self) {
        let list = self.lock();
        for client in &list.clients {
            // Wakes a thread that waits for a request. A client that is gone already cannot be shut down.
            let _ = client.stream.shutdown(Shutdown::Read);
        }
        let connected = |list: &mut List| !list.clients.is_empty();
        let waited = self.changed.wait_timeout_while(list, FLUSH_TIME, connected);
        let (list, _) = waited.unwrap_or_else(PoisonError::into_inner);
        for client in &list.clients {
            let _ = client.stream.shutdown(Shutdown::Both);
        }
    }
}

/// Serves one client until it leaves, is dropped, or the server stops.
fn serve<H>(clients: &Clients, stream: &Arc<UnixStream>, handler: &H) -> io::Result<()>
where
    H: Fn(Request) -> Outcome,
{
    let mut input = BufReader::new(&**stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // One byte more than is allowed: a newline, or too long a line. The last line need not end in a newline.
        let limit = u64::try_from(MAX_LINE + 1).unwrap_or(u64::MAX);
        input.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if line.is_empty() || !clients.set_waiting(stream, true) {
            return Ok(());
        }
        let request = line.strip_suffix(b"\n").unwrap_or(&line);
        let too_long = request.len() > MAX_LINE;
        let outcome = if too_long {
            Err(refusal(format!("a request may have at most {MAX_LINE} bytes")))
        } else {
            match serde_json::from_slice(request) {
                Ok(request) => handler(request),
                Err(error) => Err(refusal(format!("not a request: {error}"))),
            }
        };
        let reply = encoded(&outcome);
        // What the socket takes at once goes out before this client may have to make room for another one.
        let sent =
            send(stream.as_raw_fd(), &reply, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).unwrap_or(0);
        clients.set_waiting(stream, false);
        (&**stream).write_all(&reply[sent..])?;
        if too_long {
            input.skip_until(b'\n')?;
        }
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

fn refusal(error: String) -> Refusal {
    Refusal { error }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::mpsc::{Receiver, channel};

    use nix::errno::Errno;
    use serde_json::json;

    use super::*;
    use crate::client::{ClientError, ControlClient};
    use crate::reply::Reply;

    /// Answers `status`, and a long `stats`; refuses the rest.
    fn handler(request: Request) -> Outcome {
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
        stream.shutdown(Shutdown::Write).unwrap();
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
        let mut silent: Vec<_> = (0..=MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        // The last of these took the first one's place.
        let mut end = [0];
        assert_eq!(silent[0].read(&mut end).unwrap(), 0);
        assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
        assert_eq!(silent[1].read(&mut end).unwrap(), 0);
    }

    /// A server that has `pause` answered by whoever receives its reply.
    fn started_with_slow_pause(directory: &tempfile::TempDir) -> (PathBuf, ControlServer, Receiver<Reply>) {
        let path = directory.path().join("control");
        let (pauses, pending) = channel();
        let answer = move |request| match request {
            Request::Pause => {
                let (reply, outcome) = Reply::channel();
                pauses.send(reply).unwrap();
                outcome.recv().unwrap_or_else(|_| Err(refusal("unanswered".to_owned())))
            }
            other => handler(other),
        };
        let server = ControlServer::start(BoundSocket::bind(&path).unwrap(), answer).unwrap();
        (path, server, pending)
    }

    #[test]
    fn a_slow_request_does_not_hold_up_other_clients() {
        let directory = tempfile::tempdir().unwrap();
        let (path, server, pending) = started_with_slow_pause(&directory);
        let mut patient = BufReader::new(UnixStream::connect(&path).unwrap());
        patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"status\"}\n").unwrap();
        let reply = pending.recv().unwrap();
        // A client that waits for an answer does not make room for others.
        let others: Vec<_> = (0..MAX_CLIENTS).map(|_| ControlClient::connect(&path).unwrap()).collect();
        for mut other in others.into_iter().rev().take(MAX_CLIENTS - 1) {
            other.call(&Request::Status).unwrap();
        }
        reply.send(Ok(json!({"done": true})));
        let mut lines = [String::new(), String::new()];
        for line in &mut lines {
            patient.read_line(line).unwrap();
        }
        assert_eq!(lines, ["{\"done\":true}\n", "{\"state\":\"waiting\"}\n"]);

        // A reply that is dropped refuses the request.
        patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"pause\"}\n").unwrap();
        drop(pending.recv().unwrap());
        let mut line = String::new();
        patient.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"error\":\"unanswered\"}\n");
        // One that is sent just before the server stops reaches its client.
        pending.recv().unwrap().send(Ok(json!({"last": true})));
        server.stop();
        line.clear();
        patient.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"last\":true}\n");
    }

    #[test]
    fn a_new_client_waits_while_all_others_wait_for_answers() {
        let directory = tempfile::tempdir().unwrap();
        let (path, server, pending) = started_with_slow_pause(&directory);
        let pause = || {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"{\"command\":\"pause\"}\n").unwrap();
            (client, pending.recv().unwrap())
        };
        let (clients, mut replies): (Vec<_>, Vec<_>) = (0..MAX_CLIENTS).map(|_| pause()).unzip();
        let next = std::thread::spawn({
            let path = path.clone();
            move || exchange(&path, b"{\"command\":\"status\"}\n")
        });
        sleep(Duration::from_millis(50));
        assert!(!next.is_finished());
        replies.remove(0).send(Ok(json!({})));
        assert_eq!(next.join().unwrap(), "{\"state\":\"waiting\"}\n");
        drop(replies);
        server.stop();
        for mut client in clients {
            let mut reply = String::new();
            client.read_to_string(&mut reply).unwrap();
            assert!(reply.ends_with("}\n"), "{reply:?}");
        }
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
        // More replies than the socket's buffers hold: the server is soon in the middle of one.
        stream.write_all(&b"{\"command\":\"stats\"}\n".repeat(100)).unwrap();
        sleep(Duration::from_millis(50));
        let mut reader = BufReader::new(stream);
        let mut reply = String::new();
        reader.read_line(&mut reply).unwrap();
        let stopper = std::thread::spawn(move || server.stop());
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        stopper.join().unwrap();
        assert!(rest.is_empty() || rest.ends_with('\n'), "a reply was cut off");
        assert!(!path.exists());
    }
}
