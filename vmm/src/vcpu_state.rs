//! Saves a vCPU's state, and restores it into another vCPU.
//!
//! The order matters. [`save`] first reads what may still change the rest (a pending start-up interrupt), and reads the
//! timer's deadline before the local APIC: a timer that fires in between is saved twice rather than lost. [`restore`]
//! sets the time stamp counter before the timer that depends on it, and the local APIC (its mode) before the deadline.
#![expect(unsafe_code, reason = "the time stamp counter's offset is a device attribute, given by address")]

use baton_protocol::migration::refusal::Refusal;
use baton_protocol::migration::state::{Msr, VcpuState};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_cpuid_entry2,
    kvm_device_attr, kvm_msr_entry, kvm_sregs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::kvm_structure::{WrongSize, opaque, structure};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// The time stamp counter. Its offset is migrated instead.
const MSR_TSC: u32 = 0x10;
const CR4_VMX_ENABLE: u64 = 1 << 13;
const EFER_SVM_ENABLE: u64 = 1 << 12;

/// Why a vCPU's state cannot be saved or restored.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("KVM refused a vCPU's {what}")]
    Kvm {
        /// Which part of the state.
        what: &'static str,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register that KVM refuses.
    #[error("KVM refused the model-specific register {0:#x}")]
    Msr(u32),
    /// More registers than KVM's lists hold.
    #[error("KVM's lists cannot hold a vCPU's registers")]
    List(#[source] vmm_sys_util::fam::Error),
    /// A part of the state has the wrong size.
    #[error(transparent)]
    Size(#[from] WrongSize),
    /// The guest uses hardware virtualisation, whose state is not migrated.
    #[error("{}: {refusal}", refusal.name())]
    Nested {
        /// The refusal that the target sends when it sees this beforehand.
        refusal: Refusal,
    },
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { what, source }
}

/// Returns the model-specific registers to migrate: all that this host's KVM lists, except the time stamp counter.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, VcpuStateError> {
    let list = kvm.get_msr_index_list().map_err(refused("list of model-specific registers"))?;
    Ok(list.as_slice().iter().copied().filter(|&index| index != MSR_TSC).collect())
}

/// Returns whether this host's KVM reads and sets the time stamp counter's offset (since Linux 5.16).
pub fn moves_tsc(vcpu: &VcpuFd) -> bool {
    let attribute = tsc_offset_attribute(0);
    // SAFETY: the request only reads the structure, which lives as long as the call.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) == 0 }
}

/// Returns the state of a paused vCPU, with the model-specific registers `indices`.
pub fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<VcpuState, VcpuStateError> {
    let run_state = vcpu.get_mp_state().map_err(refused("run state"))?;
    let registers = vcpu.get_regs().map_err(refused("general registers"))?;
    let special = vcpu.get_sregs().map_err(refused("special registers"))?;
    refuse_nested(&special)?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(refused("CPUID"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().iter().map(opaque).collect(),
        run_state: opaque(&run_state),
        registers: opaque(&registers),
        special_registers: opaque(&special),
        extended_state: opaque(&vcpu.get_xsave().map_err(refused("extended state"))?),
        extended_controls: opaque(&vcpu.get_xcrs().map_err(refused("extended control registers"))?),
        debug_registers: opaque(&vcpu.get_debug_regs().map_err(refused("debug registers"))?),
        msrs: read_msrs(vcpu, indices)?,
        local_apic: opaque(&vcpu.get_lapic().map_err(refused("local APIC"))?),
        events: opaque(&vcpu.get_vcpu_events().map_err(refused("pending events"))?),
        tsc_khz: vcpu.get_tsc_khz().map_err(refused("time stamp counter's frequency"))?,
        tsc_offset: tsc_offset(vcpu)?,
    })
}

/// Restores a state into a vCPU that has never run.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    let special: kvm_sregs = structure("special registers", &state.special_registers)?;
    refuse_nested(&special)?;
    let cpuid: Result<Vec<_>, _> =
        state.cpuid.iter().map(|entry| structure::<kvm_cpuid_entry2>("CPUID entry", entry)).collect();
    let cpuid = CpuId::from_entries(&cpuid?).map_err(VcpuStateError::List)?;
    vcpu.set_cpuid2(&cpuid).map_err(refused("CPUID"))?;
    vcpu.set_tsc_khz(state.tsc_khz).map_err(refused("time stamp counter's frequency"))?;
    set_tsc_offset(vcpu, state.tsc_offset)?;
    vcpu.set_mp_state(structure("run state", &state.run_state)?).map_err(refused("run state"))?;
    vcpu.set_regs(&structure("general registers", &state.registers)?)
        .map_err(refused("general registers"))?;
    vcpu.set_sregs(&special).map_err(refused("special registers"))?;
    let extended = structure("extended state", &state.extended_state)?;
    // SAFETY: the structure is complete; KVM reads beyond it only in processes that enable dynamic features, which
    // this one does not.
    unsafe { vcpu.set_xsave(&extended) }.map_err(refused("extended state"))?;
    vcpu.set_xcrs(&structure("extended control registers", &state.extended_controls)?)
        .map_err(refused("extended control registers"))?;
    vcpu.set_debug_regs(&structure("debug registers", &state.debug_registers)?)
        .map_err(refused("debug registers"))?;
    vcpu.set_lapic(&structure("local APIC", &state.local_apic)?).map_err(refused("local APIC"))?;
    write_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&structure("pending events", &state.events)?).map_err(refused("pending events"))
}

/// Tells the guest, through its kvmclock page, that it was paused, so that it does not report a lock-up.
pub fn notify_paused(vcpu: &VcpuFd) {
    if let Err(error) = vcpu.kvmclock_ctrl()
        // The guest does not use kvmclock (yet).
        && error.errno() != libc::EINVAL
    {
        tracing::warn!("cannot tell the guest on a vCPU that it was paused: {error}");
    }
}

/// Returns whether the guest on a paused vCPU uses hardware virtualisation.
pub fn is_nested(vcpu: &VcpuFd) -> Result<bool, VcpuStateError> {
    Ok(has_guests(&vcpu.get_sregs().map_err(refused("special registers"))?))
}

fn has_guests(special: &kvm_sregs) -> bool {
    special.cr4 & CR4_VMX_ENABLE != 0 || special.efer & EFER_SVM_ENABLE != 0
}

fn refuse_nested(special: &kvm_sregs) -> Result<(), VcpuStateError> {
    if has_guests(special) { Err(VcpuStateError::Nested { refusal: Refusal::Nested }) } else { Ok(()) }
}

fn entries(msrs: impl Iterator<Item = Msr>) -> Result<Msrs, VcpuStateError> {
    let entry = |msr: Msr| kvm_msr_entry { index: msr.index, data: msr.value, ..kvm_msr_entry::default() };
    Msrs::from_entries(&msrs.map(entry).collect::<Vec<_>>()).map_err(VcpuStateError::List)
}

/// Reads the listed registers that this vCPU has. Its CPUID affects which ones it has.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VcpuStateError> {
    let mut read = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let mut wanted = entries(rest.iter().map(|&index| Msr { index, value: 0 }))?;
        // KVM stops at the first register that the vCPU does not have.
        let count = vcpu.get_msrs(&mut wanted).map_err(refused("model-specific registers"))?.min(rest.len());
        let found = wanted.as_slice().iter().take(count);
        read.extend(found.map(|entry| Msr { index: entry.index, value: entry.data }));
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), VcpuStateError> {
    let written =
        vcpu.set_msrs(&entries(msrs.iter().copied())?).map_err(refused("model-specific registers"))?;
    match msrs.get(written) {
        Some(msr) => Err(VcpuStateError::Msr(msr.index)),
        None => Ok(()),
    }
}

fn tsc_offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
        ..kvm_device_attr::default()
    }
}

fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, VcpuStateError> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_attribute((&raw mut offset).expose_provenance() as u64);
    // SAFETY: KVM writes eight bytes to the address, which is that of a variable of this size.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(offset),
        _ => Err(refused("time stamp counter's offset")(kvm_ioctls::Error::last())),
    }
}

fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), VcpuStateError> {
    let attribute = tsc_offset_attribute((&raw const offset).expose_provenance() as u64);
    // SAFETY: KVM reads eight bytes from the address, which is that of a variable of this size.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(refused("time stamp counter's offset")(kvm_ioctls::Error::last())),
    }
}
