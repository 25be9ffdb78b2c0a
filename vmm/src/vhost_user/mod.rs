//! The front-end's side of vhost-user.

pub mod frontend;
