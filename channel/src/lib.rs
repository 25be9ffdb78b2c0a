//! What Baton processes share: [socket files](bound_socket), [`packet`]s with descriptors, the [`peer`]'s identity,
//! [sealed memfds](sealed_memfd), and the [`ownership`] word of a hand-over, which both processes have mapped.

pub mod bound_socket;
pub mod connect;
pub mod ownership;
pub mod packet;
mod path_trust;
pub mod peer;
pub mod retry;
pub mod scm;
pub mod sealed_memfd;
