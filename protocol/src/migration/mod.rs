//! How a VM moves from one VMM to another on the same host (DESIGN: "Local VM migration").
//!
//! Both ends are connected by a Unix stream socket. Who owns the VM is said by the [ownership word](crate::ownership),
//! never by a message:
//!
//! | state (source / target) | the VM | the peer is gone, silent, or refuses |
//! |---|---|---|
//! | greeting / greeted | runs at the source | source: goes on; target: waits again |
//! | preparing / prepared | runs at the source | the same |
//! | stopping, restoring / ready | stands still, is the source's | the same; the source's devices run again first |
//! | offered / ready | stands still, is the first one's that swaps the word | the swap decides |
//! | completed / active | is the target's | nothing |
//!
//! [`state`] is the VM as it travels, [`facts`] what is said of it before anything moves, [`refusal`] has the reasons
//! why it cannot, [`validate`] judges both, [`message`] has the messages, [`source`] and [`target`] the two ends.

pub mod facts;
pub mod message;
pub mod refusal;
pub mod source;
pub mod state;
pub mod target;
pub mod validate;
