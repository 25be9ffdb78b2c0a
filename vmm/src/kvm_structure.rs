//! Converts KVM's structures to bytes and back, to migrate their contents.

use baton_protocol::migration::state::Opaque;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes that do not have the size of their structure.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{what}: {found} bytes instead of {expected}")]
pub struct WrongSize {
    /// Which structure.
    pub what: &'static str,
    /// The number of bytes received.
    pub found: usize,
    /// The structure's size.
    pub expected: usize,
}

/// Returns a structure's bytes.
pub fn opaque<T: IntoBytes + Immutable>(structure: &T) -> Opaque {
    Opaque(structure.as_bytes().to_vec())
}

/// Returns the structure that `bytes` hold. `what` names it in the error.
pub fn structure<T: FromBytes>(what: &'static str, bytes: &Opaque) -> Result<T, WrongSize> {
    T::read_from_bytes(&bytes.0).map_err(|_| WrongSize {
        what,
        found: bytes.0.len(),
        expected: size_of::<T>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_survives_conversion_and_wrong_size_is_rejected() {
        let registers = kvm_bindings::kvm_regs { rip: 7, ..kvm_bindings::kvm_regs::default() };
        let bytes = opaque(&registers);
        assert_eq!(structure("registers", &bytes), Ok(registers));
        let short = Opaque(bytes.0[1..].to_vec());
        let error = structure::<kvm_bindings::kvm_regs>("registers", &short).unwrap_err();
        assert_eq!(error.to_string(), "registers: 143 bytes instead of 144");
    }
}
