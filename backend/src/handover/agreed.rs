//! What the [prologue](super::prologue) passes on to the next role.

use std::time::Duration;

use baton_channel::message_socket::MessageSocket;
use baton_channel::peer::PeerProcess;

use crate::control::Call;
use crate::events::Watched;

/// A target that has agreed to take the device or the session.
#[derive(Debug)]
pub struct AgreedTarget {
    /// The connection to the target.
    pub link: Option<Watched<MessageSocket>>,
    /// The target's process, which is watched for a session only.
    pub process: Option<Watched<PeerProcess>>,
    /// The target's path.
    pub peer: String,
    /// The operator's request, still unanswered.
    pub call: Option<Call>,
    /// When the hand-over began.
    pub began: Duration,
}

/// A source whose device or session this target has agreed to take.
#[derive(Debug)]
pub struct AgreedSource {
    /// The connection to the source.
    pub link: Option<Watched<MessageSocket>>,
    /// The source's process, which is watched for a session only.
    pub process: Option<Watched<PeerProcess>>,
    /// Whether the source runs as the same user.
    pub same_user: bool,
    /// How many vhost-net instances were open before the prologue opened more for a session.
    pub vhosts: Option<usize>,
}
