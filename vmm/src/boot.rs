//! Loads the kernel, the initial RAM disk, the command line and the boot parameters into guest memory, as the
//! Linux/x86 boot protocol requires for its 64-bit entry point (Documentation/arch/x86/boot.rst).
//!
//! The first bytes tell a bzImage from an uncompressed ELF vmlinux. Both are entered in long mode with the boot
//! parameters' address in RSI; the bzImage decompresses itself first.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, load_cmdline};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::config::Config;
use crate::memory::{GuestMemory, HOLE_END, HOLE_START};
use crate::platform::{ACPI_TABLES, COMMAND_LINE, CONVENTIONAL_END, EXTENDED_START, ZERO_PAGE};

/// The start of every guest's command line. `--cmdline` is appended.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1";

/// The longest command line of an x86 kernel, with its terminating zero.
const COMMAND_LINE_CAPACITY: usize = 2048;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Where the 64-bit entry point lies in a loaded bzImage.
const BZIMAGE_ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADER_UNDEFINED: u8 = 0xff;
const ELF_KERNEL_ALIGNMENT: u32 = 2 << 20;
/// The highest address of an initial RAM disk if the kernel does not state one.
const INITRD_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why the guest cannot be loaded.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file that cannot be opened or read.
    #[error("cannot read {what} {}", path.display())]
    File {
        /// What the file is.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The I/O error.
        #[source]
        source: std::io::Error,
    },
    /// Neither a bzImage nor an ELF that can be loaded.
    #[error("cannot load kernel {} into {memory} bytes of guest memory; give a bzImage or an uncompressed vmlinux, or more --memory", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// The size of guest memory.
        memory: u64,
        /// The loader's error.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A kernel for 32-bit processors.
    #[error("kernel {} has no 64-bit entry point", .0.display())]
    Not64Bit(PathBuf),
    /// Too long, or with characters that are not ASCII.
    #[error("the kernel command line is not ASCII or is longer than {} characters", COMMAND_LINE_CAPACITY - 1)]
    CommandLine(#[source] linux_loader::cmdline::Error),
    /// The command line cannot be written to guest memory.
    #[error("cannot load the kernel command line")]
    LoadCommandLine(#[source] linux_loader::loader::Error),
    /// No room for the initial RAM disk between the kernel and the end of low memory.
    #[error("initrd {} of {size} bytes does not fit into guest memory; give more --memory", path.display())]
    InitrdTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The boot parameters' address is not in guest memory.
    #[error("cannot write to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the boot CPU needs to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPoint {
    /// Where the kernel is entered in long mode.
    pub instruction: u64,
    /// The boot parameters, for RSI.
    pub boot_parameters: u64,
}

/// A loaded kernel.
struct Kernel {
    entry: u64,
    /// The first byte beyond both the image and the decompressed kernel.
    end: u64,
    header: setup_header,
    initrd_max: u64,
}

/// Loads `kernel` and everything else. `ram` lists the ranges of guest memory.
pub fn load(
    config: &Config,
    kernel: &Path,
    memory: &GuestMemory,
    ram: &[(u64, u64)],
) -> Result<EntryPoint, BootError> {
    let mut kernel = load_kernel(kernel, memory, config.memory.0)?;
    let command_line = command_line(config.cmdline.as_deref()).map_err(BootError::CommandLine)?;
    load_cmdline(memory, GuestAddress(COMMAND_LINE), &command_line).map_err(BootError::LoadCommandLine)?;
    kernel.header.cmd_line_ptr = low_address(COMMAND_LINE);
    if let Some(path) = &config.initrd {
        let low_end = ram.first().map_or(0, |(start, length)| start + length);
        let (address, size) = load_initrd(path, memory, &kernel, low_end)?;
        kernel.header.ramdisk_image = address;
        kernel.header.ramdisk_size = size;
    }
    kernel.header.type_of_loader = LOADER_UNDEFINED;

    let mut parameters =
        boot_params { hdr: kernel.header, acpi_rsdp_addr: ACPI_TABLES, ..boot_params::default() };
    let mut table = [boot_e820_entry::default(); 128];
    for (slot, entry) in table.iter_mut().zip(memory_map(ram)) {
        *slot = entry;
        parameters.e820_entries += 1;
    }
    parameters.e820_table = table;
    memory.write_obj(parameters, GuestAddress(ZERO_PAGE))?;
    Ok(EntryPoint { instruction: kernel.entry, boot_parameters: ZERO_PAGE })
}

fn command_line(extra: Option<&str>) -> Result<Cmdline, linux_loader::cmdline::Error> {
    let mut line = Cmdline::new(COMMAND_LINE_CAPACITY)?;
    line.insert_str(DEFAULT_COMMAND_LINE)?;
    if let Some(extra) = extra.map(str::trim).filter(|extra| !extra.is_empty()) {
        line.insert_str(extra)?;
    }
    Ok(line)
}

fn load_kernel(path: &Path, memory: &GuestMemory, memory_size: u64) -> Result<Kernel, BootError> {
    let unreadable = |source| BootError::File { what: "kernel", path: path.to_owned(), source };
    let unloadable = |source| BootError::Kernel { path: path.to_owned(), memory: memory_size, source };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut magic = Vec::new();
    file.by_ref().take(4).read_to_end(&mut magic).map_err(unreadable)?;
    file.rewind().map_err(unreadable)?;

    if magic == ELF_MAGIC {
        let loaded =
            Elf::load(memory, None, &mut file, Some(GuestAddress(EXTENDED_START))).map_err(unloadable)?;
        let header = setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: ELF_KERNEL_ALIGNMENT,
            ..setup_header::default()
        };
        return Ok(Kernel {
            entry: loaded.kernel_load.0,
            end: loaded.kernel_end,
            header,
            initrd_max: INITRD_MAX,
        });
    }
    let loaded =
        BzImage::load(memory, None, &mut file, Some(GuestAddress(EXTENDED_START))).map_err(unloadable)?;
    let header = loaded
        .setup_header
        .filter(|header| header.version >= 0x20c && header.xloadflags & XLF_KERNEL_64 != 0)
        .ok_or_else(|| BootError::Not64Bit(path.to_owned()))?;
    let decompressed_end = header.pref_address.saturating_add(u64::from(header.init_size));
    Ok(Kernel {
        entry: loaded.kernel_load.0 + BZIMAGE_ENTRY_64,
        end: loaded.kernel_end.max(decompressed_end),
        header,
        initrd_max: u64::from(header.initrd_addr_max),
    })
}

/// Loads the initial RAM disk as high as possible. Returns its address and size.
fn load_initrd(
    path: &Path,
    memory: &GuestMemory,
    kernel: &Kernel,
    low_end: u64,
) -> Result<(u32, u32), BootError> {
    let unreadable = |source| BootError::File { what: "initrd", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    let too_large = || BootError::InitrdTooLarge { path: path.to_owned(), size };
    let address = initrd_address(size, kernel.end, kernel.initrd_max, low_end).ok_or_else(too_large)?;
    let length = usize::try_from(size).map_err(|_| too_large())?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|error| unreadable(std::io::Error::other(error)))?;
    Ok((low_address(address), low_address(size)))
}

/// Returns the highest page-aligned address at which `size` bytes fit above `kernel_end` and below the limits.
fn initrd_address(size: u64, kernel_end: u64, initrd_max: u64, low_end: u64) -> Option<u64> {
    let end = low_end.min(initrd_max.saturating_add(1)).min(HOLE_START);
    let address = end.checked_sub(size)? & !(PAGE - 1);
    (address >= kernel_end).then_some(address)
}

/// Converts an address or size below 4 GiB for the header's 32-bit fields.
fn low_address(address: u64) -> u32 {
    debug_assert!(address < HOLE_END);
    u32::try_from(address).unwrap_or(u32::MAX)
}

/// Returns the guest's memory map: RAM, without the firmware area in the first MiB.
fn memory_map(ram: &[(u64, u64)]) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, r#type| boot_e820_entry { addr: start, size: end - start, r#type };
    let mut map =
        vec![entry(0, CONVENTIONAL_END, E820_RAM), entry(CONVENTIONAL_END, EXTENDED_START, E820_RESERVED)];
    map.extend(ram.iter().map(|&(start, length)| entry(start.max(EXTENDED_START), start + length, E820_RAM)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ranges;

    #[test]
    fn initrd_is_placed_at_the_top_of_low_memory() {
        let mib = 1 << 20;
        assert_eq!(initrd_address(mib + 1, 64 * mib, 0x7fff_ffff, 512 * mib), Some(511 * mib - PAGE));
        assert_eq!(initrd_address(mib, 64 * mib, 0x7fff_ffff, HOLE_START), Some(2047 * mib));
        assert_eq!(initrd_address(mib, 64 * mib, u64::MAX, HOLE_START), Some(HOLE_START - mib));
    }

    #[test]
    fn initrd_never_overlaps_the_kernel() {
        let mib = 1 << 20;
        assert_eq!(initrd_address(64 * mib, 64 * mib, 0x7fff_ffff, 128 * mib), Some(64 * mib));
        assert_eq!(initrd_address(64 * mib + 1, 64 * mib, 0x7fff_ffff, 128 * mib), None);
        assert_eq!(initrd_address(u64::MAX, 0, 0x7fff_ffff, 128 * mib), None);
    }

    #[test]
    fn memory_map_has_no_ram_in_the_hole() {
        let spans: Vec<(u64, u64, u32)> = memory_map(&ranges(5 << 30))
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type))
            .collect();
        assert_eq!(
            spans,
            [
                (0, 0x9fc00, E820_RAM),
                (0x9fc00, 0x100000, E820_RESERVED),
                (0x100000, HOLE_START, E820_RAM),
                (HOLE_END, 6 << 30, E820_RAM),
            ]
        );
    }

    #[test]
    fn cmdline_option_is_appended_to_the_default() {
        let line = command_line(Some(" quiet ")).unwrap();
        assert_eq!(line.as_cstring().unwrap().to_str().unwrap(), format!("{DEFAULT_COMMAND_LINE} quiet"));
        command_line(Some(&"x".repeat(COMMAND_LINE_CAPACITY))).unwrap_err();
        command_line(Some("a\0b")).unwrap_err();
    }

    #[test]
    fn missing_and_invalid_kernels_are_distinct_errors() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let missing = load_kernel(Path::new("/nonexistent/vmlinuz"), &memory, 64 << 20);
        assert!(matches!(missing, Err(BootError::File { what: "kernel", .. })));
        let empty = load_kernel(Path::new("/dev/null"), &memory, 64 << 20);
        assert!(matches!(empty, Err(BootError::Kernel { .. })));
    }
}
