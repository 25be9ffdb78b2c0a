//! Finds kernel modules and their dependencies.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A kernel module, uncompressed.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) contents: Vec<u8>,
}

/// Returns the modules and their dependencies, each after those that it depends on.
pub(super) fn with_dependencies(folder: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut paths = HashMap::new();
    list(folder, &mut paths)?;
    let mut order = Vec::new();
    let mut known = HashSet::new();
    for name in names {
        add(name, &paths, &mut known, &mut order)?;
    }
    Ok(order)
}

fn add(
    name: &str,
    paths: &HashMap<String, PathBuf>,
    known: &mut HashSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    if !known.insert(name.to_owned()) {
        return Ok(());
    }
    let path = paths.get(name).with_context(|| format!("the kernel has no module {name}"))?;
    let contents = read(path)?;
    for dependency in dependencies(&contents) {
        add(&dependency, paths, known, order)?;
    }
    order.push(Module { name: name.to_owned(), contents });
    Ok(())
}

/// Lists all modules below a directory by name, with `-` replaced by `_`.
fn list(folder: &Path, paths: &mut HashMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), paths)?;
        } else if let Some(file) = entry.file_name().to_str()
            && let Some((name, "ko" | "ko.xz")) = file.split_once('.')
        {
            paths.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot run xz")?;
        if !output.status.success() {
            bail!("xz failed on {}", path.display());
        }
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Parses the dependencies from a module's `.modinfo` section: a string `depends=one,two` between zero bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    let prefix = b"\0depends=";
    let Some(start) = module.windows(prefix.len()).position(|bytes| bytes == prefix) else {
        return Vec::new();
    };
    let list = module[start + prefix.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}
