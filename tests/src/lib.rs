//! What the process-level tests share: [`programs`] under test, guest [`images`], a [`guest`]'s console, network
//! [`traffic`], and the [`lab`], which runs a test in a machine that has what this one lacks.

pub mod guest;
pub mod images;
pub mod lab;
pub mod places;
pub mod programs;
pub mod traffic;
