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
mod tests;
