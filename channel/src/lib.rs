//! What joins two Baton processes that hand something over: [`packet`]s with descriptors on a Unix socket, the
//! [`peer`]'s identity, [sealed memfds](sealed_memfd), and the [`ownership`] word that both have mapped.

pub mod connect;
pub mod ownership;
pub mod packet;
pub mod peer;
mod place;
pub mod scm;
pub mod sealed_memfd;
