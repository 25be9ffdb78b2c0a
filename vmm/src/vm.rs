//! The KVM virtual machine: memory slots, interrupt controllers, timers, vCPUs, and the eventfds that connect
//! devices to the guest.
#![expect(unsafe_code, reason = "KVM is given the address of guest memory")]

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::EntryPoint;
use crate::cpu_state::{self, CpuStateError};
use crate::memory::GuestMemory;
use crate::platform::{IDENTITY_MAP, TASK_STATE};

/// What the VM needs of KVM.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "in-kernel timer"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// Why there is no VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// No KVM, or no right to it.
    #[error("cannot open /dev/kvm: is KVM there, and may this user open it?")]
    Open(#[source] kvm_ioctls::Error),
    /// A KVM that is too old or too small.
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    /// An operation failed.
    #[error("KVM refused the {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The vCPUs' registers.
    #[error(transparent)]
    CpuState(#[from] CpuStateError),
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Refused { what, source }
}

/// A VM and its memory, which stays mapped as long as the VM lives.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    kvm: Kvm,
    memory: GuestMemory,
}

impl Vm {
    /// A VM with `memory` and interrupt controllers, without vCPUs.
    pub fn new(memory: GuestMemory) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(VmError::Open)?;
        if let Some((_, name)) = REQUIRED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(VmError::Missing(name));
        }
        let fd = kvm.create_vm().map_err(refused("virtual machine"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(refused("identity map's address"))?;
        fd.set_tss_address(TASK_STATE).map_err(refused("task state's address"))?;
        fd.create_irq_chip().map_err(refused("interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        fd.create_pit2(pit).map_err(refused("timer"))?;
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the region is mapped for its whole length, and the VM owns the mapping: it outlives `fd`,
            // which is dropped first.
            unsafe { fd.set_user_memory_region(slot) }.map_err(refused("guest memory"))?;
        }
        Ok(Self { fd, kvm, memory })
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Makes the vCPUs; the first starts at `entry`.
    pub fn create_vcpus(&self, count: u8, entry: EntryPoint) -> Result<Vec<VcpuFd>, VmError> {
        cpu_state::write_boot_tables(&self.memory)?;
        let cpuid = cpu_state::supported_cpuid(&self.kvm)?;
        (0..count)
            .map(|id| {
                let vcpu = self.fd.create_vcpu(u64::from(id)).map_err(refused("vCPU"))?;
                cpu_state::set_up(&vcpu, &cpuid, id, count, (id == 0).then_some(entry))?;
                Ok(vcpu)
            })
            .collect()
    }

    /// Each signal of `event` becomes an edge on interrupt line `gsi`.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, gsi).map_err(refused("irqfd"))
    }

    /// The guest's writes of `value`, four bytes wide, to `address` become signals of `event`.
    pub fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(refused("ioeventfd"))
    }
}
