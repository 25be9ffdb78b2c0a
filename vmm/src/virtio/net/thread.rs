//! A network device's thread, from outside: how it is started, asked and ended.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use baton_protocol::migration::state::{DriverState, NetState, Outline};
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;

use super::device::Net;
use super::identity::OfferError;
use super::mailbox::{Answer, Command, Mailbox};
use super::shared::NetShared;
use super::worker::Worker;
use crate::config::NetConfig;
use crate::event;
use crate::memory::GuestMemory;
use crate::vhost_user::frontend::LinkError;
use crate::virtio::InvalidQueue;

/// Why a device has no back-end.
#[derive(Debug, Error)]
pub enum NetError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The back-end is of the wrong kind.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// The driver's virtqueues.
    #[error(transparent)]
    Queue(#[from] InvalidQueue),
    /// A virtqueue's used index cannot be read.
    #[error("cannot read a virtqueue's used index")]
    UsedIndex(#[source] virtio_queue::Error),
    /// No thread, no events.
    #[error("cannot start a network device's thread")]
    Thread(#[source] std::io::Error),
    /// The thread has ended.
    #[error("the network device's thread has ended")]
    Ended,
    /// The connection was lost before.
    #[error("the back-end is not connected")]
    NoBackend,
    /// A restored state whose parts contradict each other.
    #[error("the state's virtqueues do not fit the device")]
    State,
}

/// A network device's thread, and what it shares.
#[derive(Debug)]
pub struct NetThread {
    /// What the device's thread shares.
    pub shared: Arc<NetShared>,
    mailbox: Mailbox,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NetThread {
    /// Starts the thread and waits until it has greeted the back-end; gives the transport's side, too. Without
    /// `memory` the device is suspended, and its guest has yet to arrive.
    pub fn start(
        name: String,
        config: &NetConfig,
        memory: Option<GuestMemory>,
    ) -> Result<(Self, Net), NetError> {
        let shared = Arc::new(NetShared::new(config).map_err(NetError::Thread)?);
        let (commands, receiver) = channel();
        let wake = event::new().map_err(NetError::Thread)?;
        let clone = || wake.try_clone().map_err(NetError::Thread);
        let (own_wake, device_wake) = (clone()?, clone()?);
        let mut worker =
            Worker::new(name.clone(), config.clone(), Arc::clone(&shared), memory, receiver, own_wake)
                .map_err(NetError::Thread)?;
        let (greeted, greeting) = channel();
        let run = move || match worker.greet() {
            Ok(()) => {
                if greeted.send(Ok(())).is_ok() {
                    worker.run();
                }
            }
            // Nobody waits any longer: the VMM is ending.
            Err(error) => {
                let _ = greeted.send(Err(error));
            }
        };
        let thread = Builder::new().name(name).spawn(run).map_err(NetError::Thread)?;
        greeting.recv().unwrap_or_else(|_| {
            Err(NetError::Thread(std::io::Error::other("it ended before it had greeted its back-end")))
        })?;
        let net = Net::new(Arc::clone(&shared), Mailbox { commands: commands.clone(), wake: device_wake });
        Ok((Self { shared, mailbox: Mailbox { commands, wake }, thread: Mutex::new(Some(thread)) }, net))
    }

    /// The guest has got its memory, which the back-end is to share.
    pub fn use_memory(&self, memory: GuestMemory) -> Result<(), NetError> {
        self.ask(|answer| Command::UseMemory(memory, answer))
    }

    /// What the driver has started, as far as it usually stays while the driver runs.
    pub fn outline(&self) -> Result<Option<Outline>, NetError> {
        self.ask(Command::Outline)
    }

    /// Tells the back-end of the rings that a guest, which runs elsewhere yet, will most likely bring along.
    pub fn expect(&self, outline: Outline) -> Result<(), NetError> {
        self.ask(|answer| Command::Expect(outline, answer))
    }

    /// Stops the rings; on return nobody touches guest memory. The vCPUs stand still.
    pub fn suspend(&self) -> Result<(), NetError> {
        self.ask(Command::Suspend)
    }

    /// Starts the rings that were stopped, before the vCPUs run.
    pub fn resume(&self) -> Result<(), NetError> {
        self.ask(Command::Resume)
    }

    /// What the driver has started; the device is suspended.
    pub fn save(&self) -> Result<Option<DriverState>, NetError> {
        self.ask(Command::Save)
    }

    /// Takes over what the driver of another device has started; the device is suspended.
    pub fn restore(&self, state: NetState) -> Result<(), NetError> {
        self.ask(|answer| Command::Restore(Box::new(state), answer))
    }

    /// Has the back-end begin to write its state to `channel`, or to read it there; the device is suspended.
    pub fn begin_transfer(
        &self,
        direction: VhostTransferStateDirection,
        channel: OwnedFd,
    ) -> Result<(), NetError> {
        self.ask(|answer| Command::BeginTransfer(direction, channel, answer))
    }

    /// Waits until it has.
    pub fn finish_transfer(&self) -> Result<(), NetError> {
        self.ask(Command::FinishTransfer)
    }

    /// The guest has moved away: a back-end that is lost is not looked for.
    pub fn retire(&self) {
        self.mailbox.send(Command::Retire);
    }

    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, NetError> {
        let (sender, answer) = sync_channel(1);
        self.mailbox.send(command(sender));
        answer.recv().unwrap_or(Err(NetError::Ended))
    }

    /// Ends the thread and with it the connection.
    pub fn stop(&self) {
        self.mailbox.send(Command::Quit);
        self.shared.cut();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a network device's thread panicked");
        }
    }
}

impl Drop for NetThread {
    fn drop(&mut self) {
        self.stop();
    }
}
