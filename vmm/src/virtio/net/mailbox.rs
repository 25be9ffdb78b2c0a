//! The way to a network device's worker.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, SyncSender};

use baton_protocol::migration::state::{DriverState, NetState, Outline};
use vhost::vhost_user::message::VhostTransferStateDirection;
use vmm_sys_util::eventfd::EventFd;

use super::thread::NetError;
use crate::event;
use crate::memory::GuestMemory;
use crate::virtio::Activation;

/// What the device's thread answers, with its outcome.
pub type Answer<T> = SyncSender<Result<T, NetError>>;

/// What the device's thread is asked to do.
#[derive(Debug)]
pub enum Command {
    /// The guest has got its memory.
    UseMemory(GuestMemory, Answer<()>),
    /// What the driver has started, as far as it usually stays.
    Outline(Answer<Option<Outline>>),
    /// A driver that runs elsewhere will most likely bring this along. Answered once the back-end knows.
    Expect(Outline, Answer<()>),
    /// The VM stands still. Answered once nobody touches guest memory any more.
    Suspend(Answer<()>),
    /// The VM is about to run on. Answered once the rings run, or will as soon as there is a back-end.
    Resume(Answer<()>),
    /// What the driver has started, of a device that is suspended.
    Save(Answer<Option<DriverState>>),
    /// What the driver of another device has started is this one's, which is suspended and whose registers hold this.
    /// Answered once all is set up but what starts the rings.
    Restore(Box<NetState>, Answer<()>),
    /// The back-end of a suspended device begins to give its state away, or to take another's.
    BeginTransfer(VhostTransferStateDirection, OwnedFd, Answer<()>),
    /// Answered once it has.
    FinishTransfer(Answer<()>),
    /// The guest has moved away: a back-end that is lost is not looked for.
    Retire,
    /// The driver is ready. If the rings cannot be run as it wants, the device needs a reset.
    Start(Activation),
    /// The driver resets the device. Answered once nobody touches guest memory any more.
    Reset(SyncSender<()>),
    /// The VMM ends.
    Quit,
}

/// The way to the device's thread.
#[derive(Debug)]
pub struct Mailbox {
    /// Commands.
    pub commands: Sender<Command>,
    /// Signalled after each.
    pub wake: EventFd,
}

impl Mailbox {
    /// Sends a command; false if the thread has ended: then nobody answers.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        if sent {
            event::signal(&self.wake);
        }
        sent
    }
}
