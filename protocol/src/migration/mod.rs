//! Moves a VM to another VMM on the same host.
//!
//! A Unix stream socket connects the source and the target. The [ownership word](crate::ownership) decides which VMM
//! owns the VM; no message does:
//!
//! | state (source / target) | the VM | the peer is gone, silent, or refuses |
//! |---|---|---|
//! | greeting / greeted | runs at the source | source: continues; target: waits again |
//! | preparing / prepared | runs at the source | the same |
//! | stopping, restoring / ready | is stopped, owned by the source | the same, after the source has restarted its devices |
//! | offered / ready | is stopped, owned by the VMM whose swap wins | the swap decides |
//! | completed / active | is owned by the target | nothing |
//!
//! [`message`] defines the messages, [`facts`] the properties of the VM that are compared first, and [`state`] the VM's
//! state. [`validate`] checks both, with the reasons in [`refusal`]. [`source`] and [`target`] are the state machines.

pub mod facts;
pub mod message;
pub mod refusal;
pub mod source;
pub mod state;
pub mod target;
pub mod validate;
