//! The zip archives that PyTorch writes: every entry stored as it is, read in place. Believes nothing: the directory,
//! each entry's own header and the bytes that are there must agree, entries must not overlap, and no name comes twice.
//! Takes no memory but a list of the entries.
//!
//! Knows zip (APPNOTE 6.3, with its 64-bit forms), not what the entries mean; knows no tensor.

use std::collections::HashMap;

/// End of central directory: its fixed part, in bytes, and the longest comment after it.
const END: usize = 22;
const LONGEST_COMMENT: usize = 65_535;
/// Fixed parts of an entry in the directory, and of its own header.
const DIRECTORY_ENTRY: usize = 46;
const LOCAL_HEADER: usize = 30;
/// Entries that are listed: a thousand times what any network has.
const MOST_ENTRIES: u64 = 1 << 20;
/// Longest name, in bytes.
const LONGEST_NAME: usize = 4096;
/// A 32-bit field of this value has its number in the 64-bit extra field.
const IN_EXTRA: u64 = 0xffff_ffff;
/// Tag of that extra field.
const ZIP64: u16 = 1;
/// Flags: encrypted in either way; sizes follow the data.
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const SIZES_FOLLOW: u16 = 1 << 3;

/// An archive whose directory was checked.
pub(super) struct Archive<'a> {
    entries: HashMap<&'a str, Entry<'a>>,
}

struct Entry<'a> {
    bytes: &'a [u8],
    crc: u32,
}

impl<'a> Archive<'a> {
    /// Reads the directory of the archive that is all of `file`.
    pub(super) fn read(file: &'a [u8]) -> Result<Self, String> {
        let directory = Directory::find(file)?;
        let mut rest = directory.bytes;
        let mut entries = HashMap::new();
        // Where each entry lies, header included.
        let mut places = Vec::new();
        for number in 0..directory.entries {
            let (listed, after) = Listed::parse(rest)
                .ok_or_else(|| format!("archive entry {number}: its line in the directory is damaged"))?;
            rest = after;
            let name = listed.name()?;
            let fail = |what: &str| format!("archive entry {name:?}: {what}");
            let (start, bytes) = listed
                .locate(file, directory.offset)
                .map_err(|what| fail(&what))?;
            places.push((
                start,
                bytes.as_ptr_range().end as usize - file.as_ptr() as usize,
                name,
            ));
            let crc = listed.crc;
            if entries.insert(name, Entry { bytes, crc }).is_some() {
                return Err(fail("its name comes twice"));
            }
        }
        places.sort_unstable();
        if let Some(pair) = places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(format!(
                "archive entries {:?} and {:?} overlap",
                pair[0].2, pair[1].2
            ));
        }
        Ok(Self { entries })
    }

    /// The folder, with its slash, in which everything lies: the one with `file` in it.
    pub(super) fn root_of(&self, file: &str) -> Result<&'a str, String> {
        let mut roots = self.entries.keys().filter_map(|name| {
            let root = name.strip_suffix(file)?;
            (root.is_empty() || root.ends_with('/')).then_some(root)
        });
        match (roots.next(), roots.next()) {
            (Some(root), None) => Ok(root),
            (None, _) => Err(format!("not a PyTorch archive: it has no {file}")),
            _ => Err(format!("not a PyTorch archive: it has more than one {file}")),
        }
    }

    /// An entry's bytes, if it is there; compared with its checksum.
    pub(super) fn entry(&self, name: &str) -> Result<Option<&'a [u8]>, String> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        match crc32fast::hash(entry.bytes) == entry.crc {
            true => Ok(Some(entry.bytes)),
            false => Err(format!(
                "archive entry {name:?}: its bytes do not have its checksum: the file is damaged"
            )),
        }
    }
}

/// The central directory.
struct Directory<'a> {
    bytes: &'a [u8],
    /// Where it begins; entries lie before it.
    offset: usize,
    entries: u64,
}

impl<'a> Directory<'a> {
    fn find(file: &'a [u8]) -> Result<Self, String> {
        let cut_off = || "not a PyTorch archive, or cut off: it has no directory at its end".to_owned();
        let lies = || "the archive's directory is not where its end says".to_owned();
        let first = file.len().saturating_sub(END + LONGEST_COMMENT);
        let end = (first..=file.len().checked_sub(END).ok_or_else(cut_off)?)
            .rev()
            .find(|&at| {
                let comment = u16_at(&file[at..], 20).map_or(usize::MAX, usize::from);
                file[at..].starts_with(b"PK\x05\x06") && at + END + comment == file.len()
            })
            .ok_or_else(cut_off)?;
        let record = &file[end..];
        let short = |at| u16_at(record, at).map(u64::from).ok_or_else(cut_off);
        let long = |at| u32_at(record, at).map(u64::from).ok_or_else(cut_off);
        let (mut entries, mut size, mut offset) = (short(10)?, long(12)?, long(16)?);
        let mut disks = (short(4)?, short(6)?, short(8)? == entries);
        let mut limit = end;
        // The 64-bit end lies before its locator, which lies before the 32-bit one.
        if let Some(locator) = end.checked_sub(20).map(|at| &file[at..end])
            && locator.starts_with(b"PK\x06\x07")
        {
            limit = u64_at(locator, 8)
                .and_then(|at| usize::try_from(at).ok())
                .filter(|&at| at < end - 20)
                .ok_or_else(lies)?;
            let record = &file[limit..end];
            if !record.starts_with(b"PK\x06\x06") {
                return Err(lies());
            }
            let long = |at| u64_at(record, at).ok_or_else(lies);
            (entries, size, offset) = (long(32)?, long(40)?, long(48)?);
            disks = (
                u32_at(record, 16).map_or(1, u64::from),
                u32_at(record, 20).map_or(1, u64::from),
                long(24)? == entries,
            );
        }
        if disks != (0, 0, true) {
            return Err("the archive is in several files".to_owned());
        }
        if entries > MOST_ENTRIES {
            return Err(format!(
                "the archive claims {entries} entries, more than {MOST_ENTRIES}"
            ));
        }
        let start = usize::try_from(offset).map_err(|_| lies())?;
        let end = usize::try_from(size)
            .ok()
            .and_then(|size| start.checked_add(size))
            .filter(|&end| end <= limit)
            .ok_or_else(lies)?;
        Ok(Self {
            bytes: &file[start..end],
            offset: start,
            entries,
        })
    }
}

/// An entry as the directory lists it.
struct Listed<'a> {
    flags: u16,
    method: u16,
    crc: u32,
    packed: u64,
    size: u64,
    offset: u64,
    raw_name: &'a [u8],
}

impl<'a> Listed<'a> {
    /// The entry at the start of `bytes`, and what follows it.
    fn parse(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        if !bytes.starts_with(b"PK\x01\x02") {
            return None;
        }
        let name_end = DIRECTORY_ENTRY + usize::from(u16_at(bytes, 28)?);
        let extra_end = name_end + usize::from(u16_at(bytes, 30)?);
        let end = extra_end + usize::from(u16_at(bytes, 32)?);
        let mut wide = Zip64::of(bytes.get(name_end..extra_end)?);
        let mut number = |at| wide.instead_of(u32_at(bytes, at)?);
        let size = number(24)?;
        let packed = number(20)?;
        let offset = number(42)?;
        let listed = Self {
            flags: u16_at(bytes, 8)?,
            method: u16_at(bytes, 10)?,
            crc: u32_at(bytes, 16)?,
            packed,
            size,
            offset,
            raw_name: bytes.get(DIRECTORY_ENTRY..name_end)?,
        };
        Some((listed, bytes.get(end..)?))
    }

    fn name(&self) -> Result<&'a str, String> {
        let shown = || {
            let start = self.raw_name.get(..64).unwrap_or(self.raw_name);
            format!("{:?}", String::from_utf8_lossy(start))
        };
        let plain = |name: &&str| {
            let steps_out = name.split('/').any(|part| part == ".." || part == ".");
            !name.is_empty()
                && name.len() <= LONGEST_NAME
                && !name.starts_with('/')
                && !name.contains(['\\', '\0'])
                && !steps_out
        };
        std::str::from_utf8(self.raw_name)
            .ok()
            .filter(plain)
            .ok_or_else(|| format!("archive entry {}: this is no name of an entry", shown()))
    }

    /// Where the entry begins in `file`, and its bytes; `limit` is where entries end.
    fn locate(&self, file: &'a [u8], limit: usize) -> Result<(usize, &'a [u8]), String> {
        if self.method != 0 || self.packed != self.size {
            return Err("it is compressed, which PyTorch never does".to_owned());
        }
        if self.flags & ENCRYPTED != 0 {
            return Err("it is encrypted".to_owned());
        }
        let outside = || format!("its {} bytes at {} are not in the file", self.size, self.offset);
        let start = usize::try_from(self.offset)
            .ok()
            .filter(|&start| start <= limit)
            .ok_or_else(outside)?;
        let local = &file[start..limit];
        if !local.starts_with(b"PK\x03\x04") || local.len() < LOCAL_HEADER {
            return Err(format!("at {start} there is no entry"));
        }
        let length = |at| u16_at(local, at).map_or(0, usize::from);
        let name_end = LOCAL_HEADER + length(26);
        let data = name_end + length(28);
        let differs = || "its own header and the directory disagree".to_owned();
        if local.get(LOCAL_HEADER..name_end) != Some(self.raw_name)
            || u16_at(local, 6) != Some(self.flags)
            || u16_at(local, 8) != Some(self.method)
        {
            return Err(differs());
        }
        let mut wide = Zip64::of(local.get(name_end..data).ok_or_else(outside)?);
        let number = |wide: &mut Zip64, at| wide.instead_of(u32_at(local, at)?);
        let sizes = (number(&mut wide, 22), number(&mut wide, 18), u32_at(local, 14));
        let stated = (Some(self.size), Some(self.packed), Some(self.crc));
        // A writer that streams knows neither sizes nor checksum when it writes the header.
        let unknown = self.flags & SIZES_FOLLOW != 0 && sizes == (Some(0), Some(0), Some(0));
        if sizes != stated && !unknown {
            return Err(differs());
        }
        let end = usize::try_from(self.size)
            .ok()
            .and_then(|size| data.checked_add(size));
        let bytes = end.and_then(|end| local.get(data..end)).ok_or_else(outside)?;
        Ok((start, bytes))
    }
}

/// The 64-bit numbers of an entry, in the order of the 32-bit fields that they stand for.
struct Zip64<'a>(&'a [u8]);

impl<'a> Zip64<'a> {
    fn of(mut extra: &'a [u8]) -> Self {
        while let (Some(tag), Some(length)) = (u16_at(extra, 0), u16_at(extra, 2)) {
            let end = 4 + usize::from(length);
            let Some(field) = extra.get(4..end) else { break };
            if tag == ZIP64 {
                return Self(field);
            }
            extra = &extra[end..];
        }
        Self(&[])
    }

    /// The value of a 32-bit field; nothing if it is said to be here and is not.
    fn instead_of(&mut self, field: u32) -> Option<u64> {
        if u64::from(field) != IN_EXTRA {
            return Some(field.into());
        }
        let value = u64_at(self.0, 0)?;
        self.0 = &self.0[8..];
        Some(value)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
