//! What the [prologue](super::prologue) leaves to the role that goes on.

use std::time::Duration;

use baton_channel::message_socket::MessageSocket;
use baton_channel::peer::PeerProcess;

use crate::control::Call;
use crate::events::Watched;

/// A target would take the device or the session.
#[derive(Debug)]
pub struct AgreedTarget {
    /// The connection to it.
    pub link: Option<Watched<MessageSocket>>,
    /// Its process, if its death matters.
    pub process: Option<Watched<PeerProcess>>,
    /// Its path.
    pub peer: String,
    /// The operator's request, which is not answered yet.
    pub call: Option<Call>,
    /// When the hand-over began.
    pub began: Duration,
}

/// A source will give the device or the session.
#[derive(Debug)]
pub struct AgreedSource {
    /// The connection to it.
    pub link: Option<Watched<MessageSocket>>,
    /// Its process, if its death matters.
    pub process: Option<Watched<PeerProcess>>,
    /// Whether it runs as the same user.
    pub same_user: bool,
    /// How many instances of vhost-net there were before more were opened for a session.
    pub vhosts: Option<usize>,
}
