//! The kernels and initramfs images of the guests and of the lab's machine.
//!
//! `tests/setup` provides the kernels. Each request for an initramfs builds it again, and replaces the file only if the
//! contents changed, so an image is never out of date. [`GUEST_INITRAMFS`] lets the tests of one run share an image,
//! because building it takes seconds in the lab.

mod cpio;
mod libraries;
mod modules;

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use self::cpio::Cpio;
use crate::{paths, programs};

/// The environment variable with the path of [`guest_initramfs`], if it was built for this run of the tests.
pub const GUEST_INITRAMFS: &str = "BATON_GUEST_INITRAMFS";

/// Returns the guest's kernel as shipped by Debian: a bzImage.
pub fn guest_kernel() -> Result<PathBuf> {
    paths::set_up(Path::new("guest-kernel/vmlinuz"))
}

/// Returns the guest's kernel as an uncompressed ELF file.
pub fn guest_vmlinux() -> Result<PathBuf> {
    paths::set_up(Path::new("guest-kernel/vmlinux"))
}

/// Returns the guest's initramfs: a root shell on `ttyS0`, virtio-net over MMIO and PCI, busybox, `ethtool` and
/// `traffic`.
///
/// [`crate::guest::Guest`] sends commands to the shell, which `images/guest-init` starts.
pub fn guest_initramfs() -> Result<PathBuf> {
    if let Some(path) = env::var_os(GUEST_INITRAMFS) {
        return Ok(path.into());
    }
    let kernel = paths::set_up(Path::new("guest-kernel/lib"))?;
    let mut image = Cpio::new();
    image.folder("root");
    busybox(&mut image, include_bytes!("images/guest-init"))?;
    let modules = ["virtio_mmio", "virtio_pci", "virtio_net", "msr"];
    add_modules(&mut image, &kernel, &modules)?;
    for program in [programs::traffic()?, found("ethtool")?] {
        add_program(&mut image, &program)?;
    }
    store("guest.cpio", &image.finish())
}

/// Returns the initramfs of the lab's machine. `images/lab-init` mounts the root file system and switches to it.
pub(crate) fn lab_initramfs() -> Result<PathBuf> {
    let kernel = paths::set_up(Path::new("lab-kernel/lib"))?;
    let mut image = Cpio::new();
    busybox(&mut image, include_bytes!("images/lab-init"))?;
    add_modules(&mut image, &kernel, &["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"])?;
    store("lab.cpio", &image.finish())
}

/// Returns the kernel of the lab's machine.
pub(crate) fn lab_kernel() -> Result<PathBuf> {
    paths::set_up(Path::new("lab-kernel/vmlinuz"))
}

/// Returns the directory that contains the modules of [`lab_kernel`], in a directory named after its version.
pub(crate) fn lab_modules() -> Result<PathBuf> {
    paths::set_up(Path::new("lab-kernel/lib/modules"))
}

/// Adds busybox, `init`, and the basic directories and devices.
fn busybox(image: &mut Cpio, init: &[u8]) -> Result<()> {
    for folder in ["bin", "dev", "lib", "modules", "proc", "sys", "tmp"] {
        image.folder(folder);
    }
    // The kernel opens the console before it runs init.
    image.character_device("dev/console", 5, 1);
    image.file("init", 0o755, init);
    image.file("bin/busybox", 0o755, &read(&found("busybox")?)?);
    image.link("bin/sh", "busybox");
    Ok(())
}

/// Adds modules and their dependencies in `modules/`, and the order in which to load them as `modules/order`.
fn add_modules(image: &mut Cpio, kernel: &Path, names: &[&str]) -> Result<()> {
    let mut order = String::new();
    for module in modules::with_dependencies(&kernel.join("modules"), names)? {
        image.file(&format!("modules/{}.ko", module.name), 0o644, &module.contents);
        order.push_str(&module.name);
        order.push('\n');
    }
    image.file("modules/order", 0o644, order.as_bytes());
    Ok(())
}

/// Adds a stripped program in `bin/`, and its shared libraries at their paths.
fn add_program(image: &mut Cpio, program: &Path) -> Result<()> {
    let name = program.file_name().and_then(|name| name.to_str()).context("the program has no valid name")?;
    image.file(&format!("bin/{name}"), 0o755, &stripped(program)?);
    for library in libraries::of(program)? {
        let path = library.to_str().context("the path of a library is not UTF-8")?.trim_start_matches('/');
        image.file(path, 0o755, &read(&library)?);
    }
    Ok(())
}

fn stripped(program: &Path) -> Result<Vec<u8>> {
    let output = NamedTempFile::new().context("cannot create a temporary file")?;
    let status = Command::new("strip").arg("-o").arg(output.path()).arg(program).status();
    if !status.context("cannot run strip")?.success() {
        bail!("strip failed on {}", program.display());
    }
    read(output.path())
}

/// Writes an image, unless the file already has the same contents.
fn store(name: &str, contents: &[u8]) -> Result<PathBuf> {
    let folder = paths::lab()?;
    let path = folder.join(name);
    if fs::read(&path).is_ok_and(|present| present == contents) {
        return Ok(path);
    }
    let mut file =
        NamedTempFile::new_in(&folder).with_context(|| format!("cannot write to {}", folder.display()))?;
    file.write_all(contents).with_context(|| format!("cannot write {}", path.display()))?;
    // Replaces the file atomically, so that no guest boots a partial image.
    file.persist(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Returns the path of a program that is installed on this machine.
pub(crate) fn found(program: &str) -> Result<PathBuf> {
    let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin"];
    match folders.iter().map(|folder| Path::new(folder).join(program)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("{program} is not installed; run tests/setup"),
    }
}
