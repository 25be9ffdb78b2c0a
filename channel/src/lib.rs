//! Inter-process building blocks: [socket files](bound_socket), [messages](message_socket) that carry descriptors, the
//! identity of a [`peer`], [sealed memfds](sealed_memfd), and the [`ownership`] word of a hand-over, which both
//! processes map.

pub mod bound_socket;
pub mod connect;
pub mod message_socket;
pub mod ownership;
mod path_trust;
pub mod peer;
pub mod retry;
pub mod scm;
pub mod sealed_memfd;
