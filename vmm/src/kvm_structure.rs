//! The kernel's structures as bytes and back: how KVM's state travels.

use baton_protocol::migration::state::Opaque;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes that are not the structure that they should be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the {what} has {found} bytes instead of {expected}")]
pub struct WrongSize {
    /// Which structure.
    pub what: &'static str,
    /// How many bytes came.
    pub found: usize,
    /// How many it has.
    pub expected: usize,
}

/// A structure's bytes.
pub fn opaque<T: IntoBytes + Immutable>(structure: &T) -> Opaque {
    Opaque(structure.as_bytes().to_vec())
}

/// The structure whose bytes these are.
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
    fn a_structure_is_its_bytes_and_no_others() {
        let registers = kvm_bindings::kvm_regs { rip: 7, ..kvm_bindings::kvm_regs::default() };
        let bytes = opaque(&registers);
        assert_eq!(structure("registers", &bytes), Ok(registers));
        let short = Opaque(bytes.0[1..].to_vec());
        let error = structure::<kvm_bindings::kvm_regs>("registers", &short).unwrap_err();
        assert_eq!(error.to_string(), "the registers has 143 bytes instead of 144");
    }
}
