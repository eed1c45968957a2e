//! Finds sections of ELF files (32- and 64-bit, little-endian): a module's `.modinfo`, a kernel's `.notes`.
//! ELF-64 Object File Format, sections 3 and 6. The files are hostile: anything out of bounds gives `None`.

/// The content of the section of that name.
pub(crate) fn section<'a>(file: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let elf = Elf::parse(file)?;
    let names = elf.section_data(elf.names_index)?;
    (0..elf.section_count).find_map(|index| {
        let at = usize::try_from(elf.u32_at(elf.header_at(index)?)?).ok()?;
        let text = names.get(at..)?;
        let end = text.iter().position(|&b| b == 0)?;
        (text.get(..end)? == name.as_bytes()).then(|| elf.section_data(index))?
    })
}

/// The physical entry point in the Xen PVH note (type 18), if the kernel carries one.
pub(crate) fn pvh_entry(kernel: &[u8]) -> Option<u64> {
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    let mut rest = section(kernel, ".notes")?;
    loop {
        let word = |at: usize| Some(u32::from_le_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let (name_bytes, data_bytes, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let data_at = 12usize.checked_add(name_bytes.checked_next_multiple_of(4)?)?;
        let name = rest.get(12..12usize.checked_add(name_bytes)?)?;
        let data = rest.get(data_at..data_at.checked_add(data_bytes)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            let mut wide = [0; 8];
            let bytes = data.get(..data.len().min(8))?;
            wide[..bytes.len()].copy_from_slice(bytes);
            return Some(u64::from_le_bytes(wide));
        }
        rest = rest.get(data_at.checked_add(data_bytes.checked_next_multiple_of(4)?)?..)?;
    }
}

struct Elf<'a> {
    file: &'a [u8],
    wide: bool,
    table_at: usize,
    entry_bytes: usize,
    section_count: usize,
    names_index: usize,
}

impl<'a> Elf<'a> {
    fn parse(file: &'a [u8]) -> Option<Self> {
        if file.get(..4)? != b"\x7fELF" || *file.get(5)? != 1 {
            return None;
        }
        let wide = match file.get(4)? {
            1 => false,
            2 => true,
            _ => return None,
        };
        let mut elf = Self { file, wide, table_at: 0, entry_bytes: 0, section_count: 0, names_index: 0 };
        let (table, sizes) = if wide { (0x28, 0x3a) } else { (0x20, 0x2e) };
        elf.table_at = elf.word_at(table)?;
        elf.entry_bytes = usize::from(elf.u16_at(sizes)?);
        elf.section_count = usize::from(elf.u16_at(sizes + 2)?);
        elf.names_index = usize::from(elf.u16_at(sizes + 4)?);
        Some(elf)
    }

    fn header_at(&self, index: usize) -> Option<usize> {
        self.table_at.checked_add(index.checked_mul(self.entry_bytes)?)
    }

    fn section_data(&self, index: usize) -> Option<&'a [u8]> {
        let header = self.header_at(index)?;
        let (offset, size) = if self.wide { (0x18, 0x20) } else { (0x10, 0x14) };
        let start = self.word_at(header.checked_add(offset)?)?;
        let length = self.word_at(header.checked_add(size)?)?;
        self.file.get(start..start.checked_add(length)?)
    }

    fn u16_at(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.file.get(at..at.checked_add(2)?)?.try_into().ok()?))
    }

    fn u32_at(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.file.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    /// An address-sized field.
    fn word_at(&self, at: usize) -> Option<usize> {
        if self.wide {
            let bytes = self.file.get(at..at.checked_add(8)?)?;
            usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
        } else {
            usize::try_from(self.u32_at(at)?).ok()
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A 64-bit ELF with one named section besides the names' own.
    pub(crate) fn elf_with(name: &str, data: &[u8]) -> Vec<u8> {
        let names = [b"\0", name.as_bytes(), b"\0"].concat();
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let data_at = file.len();
        file.extend_from_slice(data);
        let names_at = file.len();
        file.extend_from_slice(&names);
        let table_at = file.len() as u64;
        for (name_at, at, size) in [(1u32, data_at, data.len()), (0, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name_at.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[0x28..0x30].copy_from_slice(&table_at.to_le_bytes());
        file[0x3a..0x40].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        file
    }

    fn note(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend_from_slice(&4u32.to_le_bytes());
        note.extend_from_slice(&(data.len() as u32).to_le_bytes());
        note.extend_from_slice(&kind.to_le_bytes());
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(data);
        note.resize(note.len().next_multiple_of(4), 0);
        note
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let notes = [note(6, b"linux\0"), note(18, &0x100_0850u64.to_le_bytes())].concat();
        assert_eq!(pvh_entry(&elf_with(".notes", &notes)), Some(0x100_0850));
        assert_eq!(pvh_entry(&elf_with(".notes", &note(6, b"linux\0"))), None);
        assert_eq!(section(&elf_with(".modinfo", b"x"), ".text"), None);
    }

    proptest! {
        #[test]
        fn broken_files_never_panic(flips in prop::collection::vec((0usize..400, any::<u8>()), 0..20), cut in 0usize..400) {
            let mut file = elf_with(".notes", &note(18, &[1, 2, 3, 4]));
            for (at, value) in flips {
                let at = at % file.len();
                file[at] = value;
            }
            file.truncate(cut);
            let _ = pvh_entry(&file);
        }
    }
}
