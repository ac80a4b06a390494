//! Files that lie: every one is refused in one line that says what is wrong and where, without a panic and without
//! memory for what is not there. Archives and pickles are put together by hand here, so that they can be wrong in
//! any place.

use proptest::prelude::*;

use super::super::state_dict::{self, NETWORK, StateDict};

/// An archive in the making.
#[derive(Default)]
struct Zip {
    bytes: Vec<u8>,
    directory: Vec<u8>,
    entries: u16,
}

impl Zip {
    fn entry(self, name: &str, data: &[u8]) -> Self {
        let offset = self.bytes.len();
        self.local(name, data).listed(name, data, offset)
    }

    fn local(mut self, name: &str, data: &[u8]) -> Self {
        self.bytes
            .extend(b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00");
        self.numbers(name, data, true);
        self.bytes.extend([0, 0]);
        self.bytes.extend(name.as_bytes());
        self.bytes.extend(data);
        self
    }

    fn listed(mut self, name: &str, data: &[u8], offset: usize) -> Self {
        self.directory
            .extend(b"PK\x01\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00");
        self.numbers(name, data, false);
        self.directory.extend([0; 12]);
        self.directory.extend((offset as u32).to_le_bytes());
        self.directory.extend(name.as_bytes());
        self.entries += 1;
        self
    }

    /// Checksum, both sizes, length of the name.
    fn numbers(&mut self, name: &str, data: &[u8], local: bool) {
        let out = if local {
            &mut self.bytes
        } else {
            &mut self.directory
        };
        out.extend(crc32fast::hash(data).to_le_bytes());
        for _ in 0..2 {
            out.extend((data.len() as u32).to_le_bytes());
        }
        out.extend((name.len() as u16).to_le_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        let offset = self.bytes.len() as u32;
        let size = self.directory.len() as u32;
        self.bytes.append(&mut self.directory);
        self.bytes.extend(b"PK\x05\x06\x00\x00\x00\x00");
        for _ in 0..2 {
            self.bytes.extend(self.entries.to_le_bytes());
        }
        self.bytes.extend(size.to_le_bytes());
        self.bytes.extend(offset.to_le_bytes());
        self.bytes.extend([0, 0]);
        self.bytes
    }
}

/// A tensor's entry of a dict, in pickle's operations: four floats in storage "0" unless said otherwise.
fn tensor(name: &str, view: &str) -> Vec<u8> {
    storage_tensor(name, "FloatStorage", "0", view)
}

/// `view` is offset, size and stride.
fn storage_tensor(name: &str, class: &str, key: &str, view: &str) -> Vec<u8> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let mut out = text(name);
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    out.extend(text("storage"));
    out.extend(format!("ctorch\n{class}\n").into_bytes());
    out.extend(text(key));
    out.extend(text("cpu"));
    out.extend(b"K\x04tQ");
    out.extend(view.replace(' ', "\n").into_bytes());
    out.extend(b"\x89}tRs");
    out
}

const WHOLE: &str = "I0 (I4 t(I1 t";

fn dict(entries: &[Vec<u8>]) -> Vec<u8> {
    [b"\x80\x02}".as_slice(), &entries.concat(), b"."].concat()
}

fn archive(pickle: &[u8]) -> Vec<u8> {
    Zip::default()
        .entry("x/data.pkl", pickle)
        .entry("x/data/0", &[0; 16])
        .finish()
}

fn legacy(pickle: &[u8], keys: &[u8], storages: &[u8]) -> Vec<u8> {
    [
        super::super::LEGACY_MAGIC,
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}U\x0dlittle_endian\x88s.",
        pickle,
        keys,
        storages,
    ]
    .concat()
}

const KEYS: &[u8] = b"\x80\x02]X\x01\x00\x00\x000a.";

fn storage(count: i64, values: usize) -> Vec<u8> {
    let mut bytes = count.to_le_bytes().to_vec();
    bytes.resize(8 + 4 * values, 0);
    bytes
}

fn read(file: &[u8]) -> Result<StateDict<'_>, String> {
    let refused = state_dict::read(file, &NETWORK).map_err(|refused| refused.what);
    if let Err(what) = &refused {
        assert!(!what.contains('\n') && what.len() < 2000, "{what}");
    }
    refused
}

/// What is promised of whatever is accepted.
fn check(read: &StateDict, file: &[u8]) {
    let held: usize = read.storages.iter().map(|storage| storage.bytes.len()).sum();
    assert!(
        held <= file.len(),
        "{held} bytes in storages of a file of {}",
        file.len()
    );
    for (name, view) in &read.tensors {
        let elements = read.storages[view.storage].elements() as i64;
        assert!(
            state_dict::fits(view.offset, &view.size, &view.stride, elements),
            "{name}"
        );
    }
}

#[test]
fn both_forms_are_read() {
    let pickle = dict(&[tensor("a", WHOLE), tensor("b", "I1 (I3 t(I1 t")]);
    for file in [archive(&pickle), legacy(&pickle, KEYS, &storage(4, 4))] {
        let read = read(&file).unwrap();
        let names: Vec<&str> = read.tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((names, read.storages.len()), (vec!["a", "b"], 1));
        assert_eq!(read.storages[0].bytes, [0; 16]);
    }
}

#[test]
fn the_network_of_a_checkpoint_is_found() {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let inner = |name: &str, entries: &[Vec<u8>]| {
        let dict = dict(entries);
        [text(name), dict[2..dict.len() - 1].to_vec(), b"s".to_vec()].concat()
    };
    let epoch = [text("epoch"), b"K\x03s".to_vec()].concat();
    let optimizer = inner("state_optimizer", &[inner("state", &[tensor("momentum", WHOLE)])]);
    for (entries, names, beside) in [
        (
            vec![
                epoch.clone(),
                inner("state_dict_backbone", &[tensor("module.a", WHOLE)]),
                inner("state_dict_softmax_fc", &[tensor("weight", WHOLE)]),
                optimizer.clone(),
            ],
            vec!["a"],
            vec!["epoch", "state_dict_softmax_fc", "state_optimizer"],
        ),
        (
            vec![inner(
                "model",
                &[
                    inner("state_dict", &[tensor("_orig_mod.module.a", WHOLE)]),
                    epoch.clone(),
                ],
            )],
            vec!["a"],
            vec!["epoch"],
        ),
        // A network with a layer of that name.
        (
            vec![tensor("model", WHOLE), tensor("net", WHOLE)],
            vec!["model", "net"],
            vec![],
        ),
    ] {
        let file = archive(&dict(&entries));
        let read = read(&file).unwrap();
        let found: Vec<&str> = read.tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            (found, read.beside.iter().map(String::as_str).collect()),
            (names, beside)
        );
    }
    let error = read(&archive(&dict(&[epoch, optimizer]))).unwrap_err();
    assert!(
        error.starts_with(
            "no network in it: its keys are epoch, state_optimizer, none of them state_dict_backbone"
        ),
        "{error}"
    );
}

#[test]
fn names_do_not_write_to_the_terminal() {
    let entry = b"X\x04\x00\x00\x00a\n\x1b[}s".to_vec();
    let error = read(&archive(&dict(&[entry]))).unwrap_err();
    assert!(error.contains("its keys are a\\n\\u{1b}[,"), "{error}");
}

#[test]
fn archives_that_lie_are_refused() {
    let pickle = dict(&[tensor("a", WHOLE)]);
    let good = archive(&pickle);
    assert!(read(&good).is_ok());
    let at = |needle: &[u8], nth: usize| {
        let mut places = good
            .windows(needle.len())
            .enumerate()
            .filter(|(_, w)| *w == needle);
        places.nth(nth).expect("it is there").0
    };
    let patched = |place: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[place..place + bytes.len()].copy_from_slice(bytes);
        file
    };
    let (local, listed, end) = (at(b"PK\x03\x04", 1), at(b"PK\x01\x02", 1), at(b"PK\x05\x06", 0));
    let renamed = |name: &str| {
        Zip::default()
            .entry("x/data.pkl", &pickle)
            .entry(name, &[0; 16])
            .finish()
    };
    let zip64 = {
        let mut file = good[..end].to_vec();
        file.extend(b"PK\x06\x07\x00\x00\x00\x00");
        file.extend(u64::MAX.to_le_bytes());
        file.extend([1, 0, 0, 0]);
        file.extend(&good[end..]);
        file
    };
    // The second entry lies inside of the first one's bytes.
    let inner = Zip::default().local("x/data/0", &[0; 16]).bytes;
    let overlapping = {
        let zip = Zip::default().entry("x/data.pkl", &pickle);
        let offset = zip.bytes.len();
        let start = offset + 30 + "x/data/1".len();
        zip.local("x/data/1", &inner)
            .listed("x/data/1", &inner, offset)
            .listed("x/data/0", &[0; 16], start)
            .finish()
    };
    let cases: [(Vec<u8>, &str); 22] = [
        (vec![], "not a PyTorch archive, or cut off"),
        (
            good[..good.len() - 1].to_vec(),
            "not a PyTorch archive, or cut off",
        ),
        (good[..local].to_vec(), "not a PyTorch archive, or cut off"),
        (
            patched(local + 38, &[1]),
            "\"x/data/0\": its bytes do not have its checksum",
        ),
        (patched(listed + 24, &[15]), "\"x/data/0\": it is compressed"),
        (
            patched(listed + 20, &[15, 0, 0, 0, 15]),
            "\"x/data/0\": its own header and the directory disagree",
        ),
        (
            patched(listed + 20, &[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]),
            "\"x/data/0\": its own header",
        ),
        (
            patched(listed + 20, &[0xff; 8]),
            "archive entry 1: its line in the directory is damaged",
        ),
        (
            patched(local + 18, &[0; 8]),
            "\"x/data/0\": its own header and the directory disagree",
        ),
        (
            patched(local + 30, b"y"),
            "\"x/data/0\": its own header and the directory disagree",
        ),
        (patched(listed + 10, &[8]), "\"x/data/0\": it is compressed"),
        (patched(listed + 8, &[1]), "\"x/data/0\": it is encrypted"),
        (
            patched(listed + 42, &[0xf0, 0xff, 0xff, 0x7f]),
            "16 bytes at 2147483632 are not in the file",
        ),
        (
            patched(end + 8, &[9, 0, 9, 0]),
            "archive entry 2: its line in the directory is damaged",
        ),
        (patched(end + 8, &[2, 0, 1, 0]), "the archive is in several files"),
        (
            patched(end + 16, &[0xff, 0xff]),
            "the archive's directory is not where its end says",
        ),
        (zip64, "the archive's directory is not where its end says"),
        (renamed("../x"), "\"../x\": this is no name of an entry"),
        (renamed("/etc/x"), "\"/etc/x\": this is no name of an entry"),
        (renamed("x/data.pkl"), "\"x/data.pkl\": its name comes twice"),
        (renamed("y/data.pkl"), "it has more than one data.pkl"),
        (overlapping, "\"x/data/1\" and \"x/data/0\" overlap"),
    ];
    for (file, expected) in cases {
        let error = read(&file).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let big_endian = Zip::default()
        .entry("x/data.pkl", &pickle)
        .entry("x/byteorder", b"big")
        .finish();
    assert!(read(&big_endian).unwrap_err().contains("big-endian"));
    let long = archive(&vec![b'N'; (16 << 20) + 1]);
    assert!(
        read(&long)
            .unwrap_err()
            .contains("data.pkl has 16777217 bytes, more than")
    );
}

#[test]
fn pickles_that_lie_are_refused() {
    let one = |entry: Vec<u8>| dict(&[entry]);
    let many = |entry: &str, count: usize| entry.repeat(count).into_bytes();
    let dimensions = format!("I0 ({}t({}t", "I1 ".repeat(65), "I1 ".repeat(65));
    let memo: Vec<u8> = (0..1_000_001u32)
        .flat_map(|n| [b"r".as_slice(), &n.to_le_bytes()].concat())
        .collect();
    let cases: [(Vec<u8>, &str); 24] = [
        (
            b"cposix\nsystem\n(X\x05\x00\x00\x00touchtR.".to_vec(),
            "foreign global posix.system at byte 0",
        ),
        (b"ctorch\nload\n.".to_vec(), "foreign global torch.load"),
        (
            b"\x80\x02ccopyreg\n_reconstructor\n.".to_vec(),
            "foreign global copyreg._reconstructor at byte 2",
        ),
        (
            b"ccollections\nOrderedDict\n)\x81.".to_vec(),
            "operation 0x81 at byte 26, which is not allowed",
        ),
        (b"(i__main__\nX\n.".to_vec(), "operation 0x69 at byte 1"),
        (b"\x82\x01.".to_vec(), "operation 0x82 at byte 0"),
        (many("]0", 1_100_000), "more than 1048576 values"),
        (many("]", 10_001), "more than 10000 values on the stack"),
        (many("(", 10_001), "more than 10000 open marks"),
        (
            [b"N".as_slice(), &memo, b"."].concat(),
            "more than 1000000 remembered values",
        ),
        (
            [b"X\x01\x00\x01\x00".as_slice(), &[b'a'; 65537], b"."].concat(),
            "more than 65536 bytes in one string",
        ),
        (b"}X\xff\xff\xff\xff".to_vec(), "4294967295 more bytes wanted"),
        (
            b"I5\n.".to_vec(),
            "the file holds an integer, expected a state_dict",
        ),
        (
            one(tensor("a", "I0 (I8 t(I1 t")),
            "key \"a\": size [8], stride [1], offset 0 exceed a storage of 4 elements",
        ),
        (one(tensor("a", "I0 (I2 t(I4 t")), "exceed a storage of 4"),
        (
            one(tensor("a", "I-1 (I2 t(I1 t")),
            "key \"a\": a tensor with a bad offset",
        ),
        (
            one(tensor("a", "I0 (I2 t(I-1 t")),
            "key \"a\": a tensor with a bad stride",
        ),
        (
            one(tensor("a", "I0 (I-2 t(I1 t")),
            "key \"a\": a tensor with a bad size",
        ),
        (
            one(tensor("a", "I3 (I2 t(I9223372036854775807 t")),
            "exceed a storage of 4",
        ),
        (
            one(tensor("a", "I0 (I1099511627776 t(I0 t")),
            "exceed a storage of 4",
        ),
        (
            one(tensor("a", &dimensions)),
            "key \"a\": a tensor with a bad size",
        ),
        (
            one(storage_tensor("a", "FloatStorage", "7", WHOLE)),
            "key \"a\": storage \"7\" is not in the file",
        ),
        (
            dict(&[
                tensor("a", WHOLE),
                storage_tensor("b", "LongStorage", "0", "I0 (I2 t(I1 t"),
            ]),
            "key \"b\": storage \"0\" is used with two kinds",
        ),
        (
            dict(&[tensor("a", WHOLE), tensor("module.a", WHOLE)]),
            "key \"a\" comes twice",
        ),
    ];
    for (pickle, expected) in cases {
        let error = read(&archive(&pickle)).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let odd = Zip::default()
        .entry("data.pkl", &one(tensor("a", WHOLE)))
        .entry("data/0", &[0; 15])
        .finish();
    assert!(
        read(&odd)
            .unwrap_err()
            .contains("storage \"0\" has 15 bytes, not whole F32s")
    );
    // Without elements it may be anywhere, and costs nothing.
    let empty = one(tensor(
        "a",
        "I9223372036854775807 (I0 I9223372036854775807 t(I9223372036854775807 I1 t",
    ));
    assert_eq!(read(&archive(&empty)).unwrap().tensors[0].1.offset, 0);
}

#[test]
fn older_files_that_lie_are_refused() {
    let pickle = dict(&[tensor("a", WHOLE)]);
    let file = |storages: &[u8]| legacy(&pickle, KEYS, storages);
    let good = file(&storage(4, 4));
    let cases: [(Vec<u8>, &str); 11] = [
        (
            good[..20].to_vec(),
            "the version, from byte 15: pickle is cut off",
        ),
        (good[..60].to_vec(), "the object, from byte 42: pickle is cut off"),
        (
            good[..good.len() - 1].to_vec(),
            "4 elements of 4 bytes, but the file has 15 bytes left",
        ),
        (good[..good.len() - 20].to_vec(), "the file is cut off"),
        (
            file(&storage(i64::MAX, 4)),
            "9223372036854775807 elements of 4 bytes",
        ),
        (file(&storage(-1, 4)), "-1 elements of 4 bytes"),
        (file(&storage(3, 3)), "exceed a storage of 3 elements"),
        (file(&storage(4, 5)), "4 bytes follow the last storage"),
        (legacy(&pickle, b"N.", &[]), "the storages' keys are None"),
        (
            legacy(&dict(&[]), KEYS, &storage(4, 4)),
            "storage \"0\" belongs to no tensor",
        ),
        (legacy(&pickle, b"].", &[]), "storage \"0\" is not in the file"),
    ];
    for (file, expected) in cases {
        let error = read(&file).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let place = good.windows(2).position(|w| w == b"\x88s").unwrap();
    let mut big_endian = good.clone();
    big_endian[place] = 0x89;
    assert!(read(&big_endian).unwrap_err().contains("big-endian"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Bytes changed anywhere, the end cut off; in an archive's pickle also with a checksum that fits.
    #[test]
    fn changed_files_are_read_or_refused(
        form in 0usize..3,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let good = dict(&[tensor("a", WHOLE), tensor("b", "I1 (I1 I3 t(I3 I1 t")]);
        let change = |mut bytes: Vec<u8>| {
            for (place, byte) in &edits {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            if let Some(cut) = &cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        };
        let file = match form {
            0 => change(archive(&good)),
            1 => archive(&change(good)),
            _ => change(legacy(&good, KEYS, &storage(4, 4))),
        };
        if let Ok(accepted) = read(&file) {
            check(&accepted, &file);
        }
    }
}
