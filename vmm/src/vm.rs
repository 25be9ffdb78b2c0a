//! The KVM virtual machine: memory slots, interrupt controllers, timers, vCPUs, and the eventfds that connect
//! devices to the guest.
#![expect(unsafe_code, reason = "KVM is given the address of guest memory")]

use std::sync::OnceLock;

use baton_protocol::migration::state::{Clock, Opaque, PlatformState};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data,
    kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::EntryPoint;
use crate::cpu_state::{self, CpuStateError};
use crate::host_time;
use crate::kvm_structure::{WrongSize, opaque, structure};
use crate::memory::GuestMemory;
use crate::platform::{IDENTITY_MAP, TASK_STATE};
use crate::vcpu_state::{self, VcpuStateError};

/// The KVM capabilities that the VM needs.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "in-kernel timer"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// Why a VM cannot be created, saved or restored.
#[derive(Debug, Error)]
pub enum VmError {
    /// KVM is not available, or this user may not use it.
    #[error("cannot open /dev/kvm; check that KVM is available and that this user may open it")]
    Open(#[source] kvm_ioctls::Error),
    /// KVM lacks a capability.
    #[error("this host's KVM does not support {0}")]
    Missing(&'static str),
    /// An operation failed.
    #[error("KVM refused the {what}")]
    Refused {
        /// What was requested.
        what: &'static str,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The vCPUs' registers cannot be set.
    #[error(transparent)]
    CpuState(#[from] CpuStateError),
    /// The list of model-specific registers cannot be read.
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    /// A part of the state has the wrong size.
    #[error(transparent)]
    Size(#[from] WrongSize),
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Refused { what, source }
}

/// A VM and its memory, which stays mapped as long as the VM lives.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    kvm: Kvm,
    memory: OnceLock<GuestMemory>,
}

impl Vm {
    /// Creates a VM with interrupt controllers, without vCPUs and memory.
    pub fn new() -> Result<Self, VmError> {
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
        Ok(Self { fd, kvm, memory: OnceLock::new() })
    }

    /// Adds memory to a VM that has none.
    pub fn add_memory(&self, memory: GuestMemory) -> Result<(), VmError> {
        let memory = self.memory.get_or_init(|| memory);
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
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused("guest memory"))?;
        }
        Ok(())
    }

    /// Returns guest memory, which is empty before [`Self::add_memory`].
    pub fn memory(&self) -> GuestMemory {
        self.memory.get().cloned().unwrap_or_default()
    }

    /// Creates the vCPUs. The first starts at `entry`. Without `entry`, the vCPUs' state must be restored.
    pub fn create_vcpus(&self, count: u8, entry: Option<EntryPoint>) -> Result<Vec<VcpuFd>, VmError> {
        if entry.is_some() {
            cpu_state::write_boot_tables(&self.memory())?;
        }
        let cpuid = cpu_state::supported_cpuid(&self.kvm)?;
        (0..count)
            .map(|id| {
                let vcpu = self.fd.create_vcpu(u64::from(id)).map_err(refused("vCPU"))?;
                cpu_state::set_up(&vcpu, &cpuid, id, count, entry.filter(|_| id == 0))?;
                Ok(vcpu)
            })
            .collect()
    }

    /// Turns each signal of `event` into an edge on interrupt line `gsi`.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, gsi).map_err(refused("irqfd"))
    }

    /// Turns the guest's writes of `value`, four bytes wide, to `address` into signals of `event`.
    pub fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(refused("ioeventfd"))
    }

    /// Returns the model-specific registers that a vCPU's state includes.
    pub fn msr_indices(&self) -> Result<Vec<u32>, VmError> {
        Ok(vcpu_state::msr_indices(&self.kvm)?)
    }

    /// Returns the state of the interrupt controllers, the timer and the clock. The vCPUs must be paused.
    pub fn save(&self) -> Result<PlatformState, VmError> {
        // Read the host's time first: a delay in between puts the guest's clock ahead rather than behind.
        let host = host_time::now();
        let clock = self.fd.get_clock().map_err(refused("guest's clock"))?;
        Ok(PlatformState {
            pic_primary: self.interrupt_controller(KVM_IRQCHIP_PIC_MASTER)?,
            pic_secondary: self.interrupt_controller(KVM_IRQCHIP_PIC_SLAVE)?,
            io_apic: self.interrupt_controller(KVM_IRQCHIP_IOAPIC)?,
            timer: opaque(&self.fd.get_pit2().map_err(refused("timer's state"))?),
            clock: Clock { guest: clock.clock, host },
        })
    }

    fn interrupt_controller(&self, id: u32) -> Result<Opaque, VmError> {
        let mut chip = kvm_irqchip { chip_id: id, ..kvm_irqchip::default() };
        self.fd.get_irqchip(&mut chip).map_err(refused("interrupt controllers' state"))?;
        Ok(opaque(&chip))
    }

    /// Restores the interrupt controllers and the timer, after the vCPUs. [`Self::set_clock`] sets the clock.
    pub fn restore(&self, state: &PlatformState) -> Result<(), VmError> {
        self.fd.set_pit2(&structure("timer", &state.timer)?).map_err(refused("timer's state"))?;
        for (id, bytes) in [
            (KVM_IRQCHIP_PIC_MASTER, &state.pic_primary),
            (KVM_IRQCHIP_PIC_SLAVE, &state.pic_secondary),
            (KVM_IRQCHIP_IOAPIC, &state.io_apic),
        ] {
            let chip = kvm_irqchip { chip_id: id, ..structure("interrupt controller", bytes)? };
            self.fd.set_irqchip(&chip).map_err(refused("interrupt controllers' state"))?;
        }
        Ok(())
    }

    /// Sets the guest's clock to what it would be without the pause. The vCPUs must be restored first: their state
    /// decides what the clock runs by.
    pub fn set_clock(&self, clock: Clock) -> Result<(), VmError> {
        let passed = host_time::now().saturating_sub(clock.host);
        let clock = kvm_clock_data { clock: clock.guest.wrapping_add(passed), ..kvm_clock_data::default() };
        self.fd.set_clock(&clock).map_err(refused("guest's clock"))
    }
}
