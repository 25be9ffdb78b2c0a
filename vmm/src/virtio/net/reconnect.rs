//! Connects to a device's back-end, and reconnects when it is lost.
//!
//! Reconnecting runs on its own thread, because a handshake can take long: a busy or stuck back-end must not keep the
//! worker from serving its driver. The thread ends with the first back-end that accepts a connection, usable or not.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::shared::NetShared;
use crate::event;
use crate::shutdown::ShutdownHandle;
use crate::vhost_user::frontend::{Connection, ConnectionError, connect_to};

/// The time between two attempts. The kernel does not signal that a Unix socket listens again.
const INTERVAL: Duration = Duration::from_millis(100);

/// Connects to the device's back-end, which must be listening.
pub fn connect(shared: &NetShared) -> Result<Connection, ConnectionError> {
    handshake(shared, open(shared)?)
}

/// Opens a connection that other threads can shut down.
fn open(shared: &NetShared) -> Result<UnixStream, ConnectionError> {
    let stream = connect_to(shared.socket())?;
    let handle = ShutdownHandle::new(&stream).map_err(ConnectionError::Socket)?;
    shared.set_shutdown_handle(Some(handle));
    Ok(stream)
}

fn handshake(shared: &NetShared, stream: UnixStream) -> Result<Connection, ConnectionError> {
    Connection::establish(stream, shared.queue_pairs() * 2)
}

/// A reconnection in progress.
#[derive(Debug)]
pub struct Reconnection {
    outcome: Receiver<Result<Connection, ConnectionError>>,
    /// Dropped to end the thread.
    running: Option<Sender<()>>,
    shared: Arc<NetShared>,
    thread: Option<JoinHandle<()>>,
}

impl Reconnection {
    /// Starts the thread, which signals `wake` when it ends.
    pub fn start(shared: Arc<NetShared>, wake: Arc<EventFd>) -> std::io::Result<Self> {
        let (running, stopped) = channel();
        let (sender, outcome) = channel();
        let attempts = Attempts { shared: Arc::clone(&shared), stopped };
        let thread = Builder::new().name("reconnect".to_owned()).spawn(move || {
            if let Some(outcome) = attempts.run() {
                // Fails if the worker has ended.
                let _ = sender.send(outcome);
            }
            event::signal(&wake);
        })?;
        Ok(Self { outcome, running: Some(running), shared, thread: Some(thread) })
    }

    /// Returns the outcome, if the thread has ended.
    pub fn outcome(&mut self) -> Option<Result<Connection, ConnectionError>> {
        let outcome = self.outcome.try_recv().ok()?;
        self.join();
        Some(outcome)
    }

    fn join(&mut self) {
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reconnects to a back-end panicked");
        }
    }
}

impl Drop for Reconnection {
    fn drop(&mut self) {
        if self.thread.is_none() {
            return;
        }
        // Ends a handshake in progress. No other one begins: the thread checks `stopped` before each handshake.
        self.running = None;
        self.shared.shut_down_connection();
        self.join();
    }
}

struct Attempts {
    shared: Arc<NetShared>,
    stopped: Receiver<()>,
}

impl Attempts {
    fn run(&self) -> Option<Result<Connection, ConnectionError>> {
        while self.stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let stream = match open(&self.shared) {
                Ok(stream) => stream,
                // No back-end listens yet.
                Err(ConnectionError::Connect(_)) => continue,
                Err(error) => return Some(Err(error)),
            };
            if self.stopped.try_recv() != Err(TryRecvError::Disconnected) {
                return Some(handshake(&self.shared, stream));
            }
        }
        None
    }
}
