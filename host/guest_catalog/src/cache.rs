//! The cache of prepared guests: one folder per guest below `$XDG_CACHE_HOME/bedplate`. Entry point of this crate.
//!
//! Invariants: one process prepares at a time (file lock); a guest is prepared in a folder of its own and renamed
//! into place, so that others see the old one, none, or the new one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::catalog::Guest;
use crate::error::{CatalogError, IoContext};
use crate::fetch::apt::Apt;
use crate::manifest::{self, DiskFormat, Manifest, Prepared};
use crate::prepare;
use crate::progress::Progress;

/// The cache, at a place in the file system.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The user's cache: `$XDG_CACHE_HOME/bedplate`, or `~/.cache/bedplate`.
    ///
    /// # Errors
    /// [`CatalogError::NoCacheFolder`] if neither variable is set to an absolute path.
    pub fn of_user() -> Result<Self, CatalogError> {
        let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
        base.map(|base| Self::at(base.join("bedplate"))).ok_or(CatalogError::NoCacheFolder)
    }

    /// A cache in a folder of the caller's choice; it need not exist yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The guest, if it is prepared and its files have the sizes that they had then.
    pub fn ready(&self, guest: &Guest) -> Option<Prepared> {
        let folder = self.guest_folder(guest);
        let manifest = Manifest::read(&folder)?;
        if manifest.recipe != prepare::recipe_stamp(guest) {
            return None;
        }
        let whole = manifest.files.iter().all(|file| {
            fs::metadata(folder.join(&file.name)).is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes)
        });
        let path = |role: &str| manifest.file(role).map(|file| folder.join(&file.name));
        let kernel = path("kernel").filter(|_| whole)?;
        let disk = [("disk-raw", DiskFormat::Raw), ("disk-qcow2", DiskFormat::Qcow2)]
            .into_iter()
            .find_map(|(role, format)| Some((path(role)?, format)));
        let catalogued = crate::find(guest.name).ok()?;
        Some(Prepared {
            guest: catalogued.name,
            kernel,
            vmlinux: path("vmlinux"),
            initrd: path("initrd"),
            disk,
            append: catalogued.append,
            version: manifest.version.clone(),
            packages: manifest.packages.clone(),
            folder,
        })
    }

    /// Gives the guest, preparing it first if it is not there.
    ///
    /// # Errors
    /// Whatever stands in the way; see [`CatalogError`].
    pub fn fetch(&self, guest: &Guest, progress: &mut dyn Progress) -> Result<Prepared, CatalogError> {
        match self.ready(guest) {
            Some(prepared) => Ok(prepared),
            None => self.prepare(guest, progress, false),
        }
    }

    /// Prepares the guest from its packages even if it is there already.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub fn fetch_again(&self, guest: &Guest, progress: &mut dyn Progress) -> Result<Prepared, CatalogError> {
        self.prepare(guest, progress, true)
    }

    /// Compares every file of a prepared guest with its recorded checksum.
    ///
    /// # Errors
    /// [`CatalogError::Spoiled`] names the first file that differs.
    pub fn verify(&self, guest: &Guest, progress: &mut dyn Progress) -> Result<(), CatalogError> {
        let folder = self.guest_folder(guest);
        let manifest = Manifest::read(&folder).unwrap_or_default();
        let spoiled = |path: &Path, reason: &str| CatalogError::Spoiled {
            guest: guest.name.into(),
            path: path.to_path_buf(),
            reason: reason.into(),
        };
        if manifest.files.is_empty() {
            return Err(spoiled(&folder.join(manifest::FILE_NAME), "it is missing"));
        }
        for file in &manifest.files {
            let path = folder.join(&file.name);
            progress.step(&format!("verify {}", file.name), None);
            if manifest::checksum(&path)? != file.sha256 {
                return Err(spoiled(&path, "its checksum differs"));
            }
        }
        Ok(())
    }

    /// Removes a prepared guest.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, guest: &Guest) -> Result<(), CatalogError> {
        let _lock = self.lock()?;
        remove_folder(&self.guest_folder(guest))
    }

    fn guest_folder(&self, guest: &Guest) -> PathBuf {
        self.folder.join("guests").join(guest.name)
    }

    fn prepare(
        &self,
        guest: &Guest,
        progress: &mut dyn Progress,
        again: bool,
    ) -> Result<Prepared, CatalogError> {
        progress.step("wait for the cache", None);
        let _lock = self.lock()?;
        // Another process may have prepared it while this one waited for the lock.
        if let Some(prepared) = self.ready(guest).filter(|_| !again) {
            return Ok(prepared);
        }
        let work = self.folder.join("work").join(guest.name);
        remove_folder(&work)?;
        let staged = work.join("guest");
        fs::create_dir_all(&staged).context("create", &staged)?;
        let apt = Apt::open(self.folder.join("apt"))?;
        let place = prepare::Place { work: &work, staged: &staged, apt: &apt };
        prepare::prepare(guest, &place, progress)?;

        let folder = self.guest_folder(guest);
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent).context("create", parent)?;
        }
        remove_folder(&folder)?;
        fs::rename(&staged, &folder).context("move into place", &folder)?;
        remove_folder(&work)?;
        self.ready(guest).ok_or_else(|| CatalogError::Spoiled {
            guest: guest.name.into(),
            path: folder,
            reason: "it is not whole right after preparing".into(),
        })
    }

    fn lock(&self) -> Result<File, CatalogError> {
        fs::create_dir_all(&self.folder).context("create", &self.folder)?;
        let path = self.folder.join("lock");
        let file = File::create(&path).context("create", &path)?;
        file.lock().context("lock", &path)?;
        Ok(file)
    }
}

fn remove_folder(path: &Path) -> Result<(), CatalogError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Quiet;

    fn prepared_by_hand(folder: &Path, guest: &Guest) -> PathBuf {
        let place = folder.join("guests").join(guest.name);
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("vmlinuz"), b"kernel").unwrap();
        fs::write(place.join("disk.raw"), b"disk").unwrap();
        let mut manifest =
            Manifest { recipe: prepare::recipe_stamp(guest), version: "6.1".into(), ..Manifest::default() };
        manifest.add("kernel", &place, "vmlinuz").unwrap();
        manifest.add("disk-raw", &place, "disk.raw").unwrap();
        manifest.write(&place).unwrap();
        place
    }

    #[test]
    fn a_whole_guest_is_ready_a_cut_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let guest = crate::find("cloud").unwrap();
        assert!(cache.ready(guest).is_none());
        let place = prepared_by_hand(folder.path(), guest);
        let ready = cache.ready(guest).unwrap();
        assert_eq!(ready.disk, Some((place.join("disk.raw"), DiskFormat::Raw)));
        assert!(cache.verify(guest, &mut Quiet).is_ok());
        fs::write(place.join("vmlinuz"), b"kernal").unwrap();
        assert!(matches!(cache.verify(guest, &mut Quiet), Err(CatalogError::Spoiled { .. })));
        fs::write(place.join("vmlinuz"), b"k").unwrap();
        assert!(cache.ready(guest).is_none());
        cache.remove(guest).unwrap();
        assert!(!place.exists());
        cache.remove(guest).unwrap();
    }
}
