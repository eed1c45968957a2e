//! A private apt state: package lists and downloads below the cache folder, for amd64 and i386 at once, with the
//! package sources and keys of the host. The host's own package state is neither read nor changed, and no root
//! rights are needed. apt checks every signature and checksum.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::error::{CatalogError, IoContext};
use crate::progress::Progress;
use crate::tools::{self, Tool};

/// Lists older than this are refreshed before use.
const LISTS_GOOD_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// A metapackage chain longer than this is a mistake.
const MAX_URIS: usize = 64;

/// The private state in a folder.
#[derive(Debug)]
pub(crate) struct Apt {
    folder: PathBuf,
}

/// A package file on disk.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) file: PathBuf,
}

struct Remote {
    file: String,
    bytes: u64,
}

impl Apt {
    /// Prepares the folder; package lists are fetched when they are first needed.
    pub(crate) fn open(folder: PathBuf) -> Result<Self, CatalogError> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            let path = folder.join(sub);
            fs::create_dir_all(&path).context("create", &path)?;
        }
        let status = folder.join("state/status");
        fs::write(&status, "").context("write", &status)?;
        let configuration = folder.join("apt.conf");
        let text = format!(
            "Dir::State \"{0}/state\";\nDir::State::status \"{0}/state/status\";\nDir::Cache \"{0}/cache\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; \"i386\"; }};\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAPT::Sandbox::User \"root\";\n",
            folder.display()
        );
        fs::write(&configuration, text).context("write", &configuration)?;
        Ok(Self { folder })
    }

    /// Makes sure that the package lists are there and not older than a day.
    pub(crate) fn refresh(&self, progress: &mut dyn Progress) -> Result<(), CatalogError> {
        if age(&self.stamp()).is_some_and(|age| age < LISTS_GOOD_FOR) {
            return Ok(());
        }
        self.refresh_now(progress)
    }

    /// Fetches the package lists. A source that fails is noted, not fatal: the lists that came may be enough.
    pub(crate) fn refresh_now(&self, progress: &mut dyn Progress) -> Result<(), CatalogError> {
        progress.step("refresh package lists", None);
        let mut update = self.command(tools::APT_GET)?;
        update.args(["update", "-q"]);
        let lists = self.folder.join("state/lists");
        let result = tools::run(update, &self.folder.join("update.log"), "", &mut || progress.at(0));
        if let Err(error) = result {
            let any = fs::read_dir(&lists)
                .context("list", &lists)?
                .filter_map(Result::ok)
                .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
            if !any {
                return Err(error);
            }
            progress.note("some package sources could not be refreshed; going on with the others");
        }
        let stamp = self.stamp();
        fs::write(&stamp, "").context("write", &stamp)
    }

    /// The first package that `metapackage` depends on whose name starts with `prefix`.
    pub(crate) fn dependency(&self, metapackage: &str, prefix: &str) -> Result<String, CatalogError> {
        let mut depends = self.command(tools::APT_CACHE)?;
        depends.args(["depends", "--important", metapackage]);
        let missing = || CatalogError::PackageMissing { package: metapackage.to_string() };
        let text = tools::output(depends, "").map_err(|_| missing())?;
        first_dependency(&text, prefix).ok_or_else(missing)
    }

    /// Downloads the newest version of each package into `folder`.
    pub(crate) fn download(
        &self,
        packages: &[&str],
        folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Package>, CatalogError> {
        match self.try_download(packages, folder, progress) {
            Err(CatalogError::ToolFailed { .. }) => {
                // The archive moved on since the lists were fetched.
                self.refresh_now(progress)?;
                self.try_download(packages, folder, progress)
            }
            other => other,
        }
    }

    fn try_download(
        &self,
        packages: &[&str],
        folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Package>, CatalogError> {
        let mut found = Vec::new();
        for name in packages {
            found.push(self.remote(name)?);
        }
        let total = found.iter().map(|remote| remote.bytes).sum();
        progress.step(&format!("download {}", packages.join(", ")), Some(total));
        let mut download = self.command(tools::APT_GET)?;
        download.args(["download", "-q"]).args(packages).current_dir(folder);
        let hint =
            "Look at the network and at the package sources under /etc/apt, then run the same command again";
        tools::run(download, &folder.join("download.log"), hint, &mut || {
            let sizes = found.iter().map(|remote| file_bytes(folder, &remote.file));
            progress.at(sizes.sum::<u64>().min(total));
        })?;
        progress.at(total);
        found
            .into_iter()
            .zip(packages)
            .map(|(remote, name)| {
                let file = folder.join(&remote.file);
                if !file.is_file() {
                    return Err(CatalogError::PackageMissing { package: (*name).to_string() });
                }
                Ok(Package { name: (*name).to_string(), version: version_of(&remote.file), file })
            })
            .collect()
    }

    /// What apt would download for a package.
    fn remote(&self, package: &str) -> Result<Remote, CatalogError> {
        let mut query = self.command(tools::APT_GET)?;
        query.args(["download", "--print-uris", "-q", package]);
        let missing = || CatalogError::PackageMissing { package: package.to_string() };
        let text = tools::output(query, "").map_err(|_| missing())?;
        text.lines().take(MAX_URIS).find_map(parse_uri_line).ok_or_else(missing)
    }

    fn command(&self, tool: Tool) -> Result<Command, CatalogError> {
        let mut command = tool.command()?;
        command.env("APT_CONFIG", self.folder.join("apt.conf"));
        Ok(command)
    }

    fn stamp(&self) -> PathBuf {
        self.folder.join("refreshed")
    }
}

impl Package {
    /// Unpacks its files below `folder` (no maintainer script runs).
    pub(crate) fn unpack(&self, folder: &Path, progress: &mut dyn Progress) -> Result<(), CatalogError> {
        progress.step(&format!("unpack {}", self.name), None);
        fs::create_dir_all(folder).context("create", folder)?;
        let mut dpkg = tools::DPKG_DEB.command()?;
        dpkg.arg("-x").arg(&self.file).arg(folder);
        tools::run(dpkg, &folder.with_extension("log"), "", &mut || progress.at(0))
    }
}

/// The Debian source files of the host that offer `suite`, for tools that keep a package state of their own.
pub(crate) fn source_files(suite: &str) -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    files.retain(|path| fs::read_to_string(path).is_ok_and(|text| offers(&text, suite)));
    files
}

/// Whether a sources file (one-line or deb822 style) offers `suite`'s main component.
fn offers(text: &str, suite: &str) -> bool {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
    words.contains(&suite) && words.contains(&"main")
}

/// `'URI' FILE SIZE HASH`
fn parse_uri_line(line: &str) -> Option<Remote> {
    let mut words = line.strip_prefix('\'')?.split_whitespace();
    let (_uri, file, bytes) = (words.next()?, words.next()?, words.next()?);
    let plain = file.ends_with(".deb") && !file.contains('/');
    plain.then_some(Remote { file: file.to_string(), bytes: bytes.parse().ok()? })
}

/// `NAME_VERSION_ARCHITECTURE.deb`, with `%3a` for a colon.
fn version_of(file: &str) -> String {
    file.split('_').nth(1).unwrap_or_default().replace("%3a", ":")
}

fn first_dependency(text: &str, prefix: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_string)
}

/// The file while it arrives, or whole.
fn file_bytes(folder: &Path, file: &str) -> u64 {
    fs::metadata(folder.join(file)).map_or(0, |meta| meta.len())
}

fn age(path: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_lines_are_read_and_odd_ones_refused() {
        let line = "'mirror/x/busybox_1%3a1.35_amd64.deb' busybox_1%3a1.35_amd64.deb 928188 SHA256:00";
        let remote = parse_uri_line(line).unwrap();
        assert_eq!((remote.file.as_str(), remote.bytes), ("busybox_1%3a1.35_amd64.deb", 928_188));
        assert_eq!(version_of(&remote.file), "1:1.35");
        assert!(parse_uri_line("'u' ../../etc/passwd.deb 1 x").is_none());
        assert!(parse_uri_line("Reading package lists...").is_none());
    }

    #[test]
    fn the_kernel_package_behind_a_metapackage() {
        let text = "linux-image-686:i386\n  Depends: linux-image-6.1.0-50-686:i386\n  Suggests: x\n";
        assert_eq!(first_dependency(text, "linux-image-").unwrap(), "linux-image-6.1.0-50-686:i386");
        assert_eq!(first_dependency("linux-image-686\n", "linux-image-"), None);
    }

    #[test]
    fn both_styles_of_sources_are_understood() {
        assert!(offers("deb mirror bookworm main contrib\n", "bookworm"));
        assert!(offers(
            "Types: deb\nURIs: m\nSuites: bookworm bookworm-updates\nComponents: main\n",
            "bookworm"
        ));
        assert!(!offers("# deb mirror bookworm main\ndeb other trixie main\n", "bookworm"));
    }
}
