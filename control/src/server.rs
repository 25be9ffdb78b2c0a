//! The server of a control socket. One thread accepts clients, and a thread for each client reads its requests and
//! writes the replies, so a client that is silent, reads no replies or waits for a slow request does not delay others.
//!
//! The server buffers at most one request and one reply for a client. At most [`MAX_CLIENTS`] are connected. A further
//! client replaces the one that has been silent for longest.

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

/// The maximum number of connected clients.
pub const MAX_CLIENTS: usize = 16;

/// How long [`ControlServer::stop`] waits for clients to read the replies to requests that they have made.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// How long to wait after a client could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running control server.
#[derive(Debug)]
pub struct ControlServer {
    socket: Arc<BoundSocket>,
    clients: Arc<Clients>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Starts the server. `handler` runs on the client's thread, so it may block.
    ///
    /// # Errors
    /// Returns an error if the thread that accepts clients cannot be created.
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

    /// Stops the server and unlinks the socket. First gives clients up to a second to read the replies to requests that
    /// they have made. Dropping the server does the same.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.clients.lock().stopping = true;
        self.clients.changed.notify_all();
        // Wakes the acceptor: accept(2) fails from now on.
        if let Err(errno) = socket::shutdown(self.socket.listener().as_raw_fd(), socket::Shutdown::Both) {
            tracing::error!(%errno, "cannot stop the control server");
            return;
        }
        if self.acceptor.take().is_some_and(|acceptor| acceptor.join().is_err()) {
            tracing::error!("the control server's thread panicked");
        }
        self.clients.flush();
    }
}

/// The thread that accepts clients.
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
                // Frees a descriptor: this process may have reached its limit.
                self.clients.lock().drop_silent();
                sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Starts a thread that serves a client.
    fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let stream = Arc::new(stream);
        if !self.clients.admit(&stream) {
            return Ok(());
        }
        let (clients, handler) = (Arc::clone(&self.clients), Arc::clone(&self.handler));
        let served = Arc::clone(&stream);
        let thread = Builder::new().name("control-client".to_owned()).spawn(move || {
            if let Err(error) = serve(&clients, &served, &*handler) {
                tracing::debug!(%error, "control connection failed");
            }
            clients.leave(&served);
        });
        thread.map(drop).inspect_err(|_| self.clients.leave(&stream))
    }
}

/// The connected clients.
#[derive(Debug, Default)]
struct Clients {
    list: Mutex<List>,
    /// Signalled when a client's request begins or ends, when a client leaves, and when the server stops.
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
    /// When the client connected, made its last request, or got its last reply.
    active: Instant,
    /// Whether the handler is working on a request of the client.
    waiting: bool,
}

impl List {
    /// Disconnects the client that has been silent for longest. Returns `false` if all clients wait for a reply.
    fn drop_silent(&mut self) -> bool {
        let silent = self.clients.iter().enumerate().filter(|(_, client)| !client.waiting);
        let Some((index, _)) = silent.min_by_key(|(_, client)| client.active) else { return false };
        // Makes the reads and writes of its thread fail.
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

    /// Adds a client as soon as there is room. Returns `false` if the server is stopping.
    fn admit(&self, stream: &Arc<UnixStream>) -> bool {
        let full = |list: &mut List| !list.stopping && !list.make_room();
        let mut list = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        let admitted = !list.stopping;
        if admitted {
            list.clients.push(Client { stream: Arc::clone(stream), active: Instant::now(), waiting: false });
        }
        admitted
    }

    /// Records whether a client waits for a reply. Returns `false` if the client is disconnected or the server is
    /// stopping, so its next request must not be served.
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

    /// Gives the clients [`FLUSH_TIME`] to read the replies to requests that they have made, then disconnects them.
    fn flush(&self) {
        let list = self.lock();
        for client in &list.clients {
            // Wakes a thread that waits for a request. Fails if the client has already disconnected.
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

/// Serves a client until it leaves or is disconnected, or the server stops.
fn serve<H>(clients: &Clients, stream: &Arc<UnixStream>, handler: &H) -> io::Result<()>
where
    H: Fn(Request) -> Outcome,
{
    let mut input = BufReader::new(&**stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // One byte more than the limit: either the newline, or the line is too long. The last line needs no newline.
        let limit = u64::try_from(MAX_LINE + 1).unwrap_or(u64::MAX);
        input.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if line.is_empty() || !clients.set_waiting(stream, true) {
            return Ok(());
        }
        let request = line.strip_suffix(b"\n").unwrap_or(&line);
        let too_long = request.len() > MAX_LINE;
        let outcome = if too_long {
            Err(refusal(format!("a request must be at most {MAX_LINE} bytes long")))
        } else {
            match serde_json::from_slice(request) {
                Ok(request) => handler(request),
                Err(error) => Err(refusal(format!("invalid request: {error}"))),
            }
        };
        let reply = encoded(&outcome);
        // Sends without blocking as much as possible while `waiting` keeps this client from being replaced.
        let sent =
            send(stream.as_raw_fd(), &reply, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).unwrap_or(0);
        clients.set_waiting(stream, false);
        (&**stream).write_all(&reply[sent..])?;
        if too_long {
            input.skip_until(b'\n')?;
        }
    }
}

/// Encodes an outcome as a line, with its newline.
fn encoded(outcome: &Outcome) -> Vec<u8> {
    let encoded = match outcome {
        Ok(value) => serde_json::to_vec(value),
        Err(refusal) => serde_json::to_vec(refusal),
    };
    let mut reply = match encoded {
        Ok(reply) if reply.len() <= MAX_LINE => reply,
        Ok(_) => br#"{"error":"the reply is too long"}"#.to_vec(),
        Err(error) => {
            tracing::error!(%error, "cannot encode a control reply");
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
mod tests;
