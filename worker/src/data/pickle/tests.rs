//! Tables of pickles as Python writes them, hostile ones, and random and mutated input.

use super::*;
use proptest::prelude::*;

const NUMPY: [Allowed; 3] = [
    CODECS_ENCODE,
    ("numpy", "ndarray"),
    ("collections", "OrderedDict"),
];

fn parse(input: &[u8]) -> Result<Pickle<'_>, PickleError> {
    read(input, &NUMPY, &Limits::default())
}

/// A value as Python would print it, for values without cycles.
fn show(value: Value) -> String {
    let join = |values: Values| values.iter().map(show).collect::<Vec<_>>().join(", ");
    let pairs = |values: Values| {
        let entries: Vec<_> = values
            .pairs()
            .map(|(k, v)| format!("{}: {}", show(k), show(v)))
            .collect();
        entries.join(", ")
    };
    match value.view() {
        View::None => "None".into(),
        View::Bool(value) => value.to_string(),
        View::Int(value) => value.to_string(),
        View::Float(value) => format!("{value:?}"),
        View::Bytes(bytes) => format!("b{:?}", String::from_utf8_lossy(bytes)),
        View::Str(text) => format!("{text:?}"),
        View::List(values) => format!("[{}]", join(values)),
        View::Tuple(values) => format!("({})", join(values)),
        View::Dict(values) => format!("{{{}}}", pairs(values)),
        View::Global(module, name) => format!("{module}.{name}"),
        View::Object(o) => {
            let state = o.state.map(show).unwrap_or_default();
            format!(
                "{}.{}({})[{}]{{{}}}{state}",
                o.module,
                o.name,
                join(o.args),
                join(o.appended),
                pairs(o.items)
            )
        }
        View::Persistent(id) => format!("<{}>", show(id)),
    }
}

#[test]
fn what_python_writes_is_read() {
    let cases: [(&[u8], &str); 15] = [
        // pickle.dumps([1, -2, 2**40, True, None, 1.5], protocol=0..2)
        (b"(lp0\nI1\naI-2\naI1099511627776\naI01\naNaF1.5\na.", "[1, -2, 1099511627776, true, None, 1.5]"),
        (b"]q\x00(K\x01J\xfe\xff\xff\xffL1099511627776L\nI01\nNG\x3f\xf8\x00\x00\x00\x00\x00\x00e.", "[1, -2, 1099511627776, true, None, 1.5]"),
        (b"\x80\x02]q\x00(K\x01J\xfe\xff\xff\xff\x8a\x06\x00\x00\x00\x00\x00\x01\x88NG\x3f\xf8\x00\x00\x00\x00\x00\x00e.", "[1, -2, 1099511627776, true, None, 1.5]"),
        (b"\x80\x02\x8a\x00.", "0"),
        (b"\x80\x02\x8a\x01\xff.", "-1"),
        // Python 2: pickle.dumps("a'\n\xc3", 0) and u"\u20ac"
        (b"S\"a'\\n\\xc3\\xa9\"\np0\n.", "b\"a'\\n\u{e9}\""),
        (b"V\\u20acx\np0\n.", "\"\u{20ac}x\""),
        // Python 3: pickle.dumps("\xe9\u20ac", 0)
        (b"V\xe9\\u20ac\np0\n.", "\"\u{e9}\u{20ac}\""),
        (b"(dp0\nS'k'\nI7\ns.", "{b\"k\": 7}"),
        (b"\x80\x02}q\x00(U\x01aK\x01U\x01bK\x02u.", "{b\"a\": 1, b\"b\": 2}"),
        (b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xc3\xbfaX\x06\x00\x00\x00latin1\x86R.", "_codecs.encode(\"\u{ff}a\", \"latin1\")[]{}"),
        (b"\x80\x04\x95\x05\0\0\0\0\0\0\0\x8c\x03abc\x94.", "\"abc\""),
        (b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R(\x8c\x01aK\x01u}b.", "collections.OrderedDict()[]{\"a\": 1}{}"),
        (b"\x80\x02(U\x07storageK\x03tQ.", "<(b\"storage\", 3)>"),
        (b"\x80\x02K\x01K\x0202\x86.", "(1, 1)"),
    ];
    for (input, expected) in cases {
        match parse(input) {
            Ok(pickle) => {
                assert_eq!(
                    show(pickle.root()),
                    expected,
                    "{:?}",
                    String::from_utf8_lossy(input)
                );
                assert_eq!(pickle.consumed(), input.len());
            }
            Err(error) => panic!("{:?}: {error}", String::from_utf8_lossy(input)),
        }
    }
}

#[test]
fn bytes_through_latin1_are_bytes() {
    let input = b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xc3\xbfaX\x06\x00\x00\x00latin1\x86R.";
    let pickle = parse(input).expect("valid");
    assert_eq!(pickle.root().bytes().as_deref(), Some(&b"\xffa"[..]));
    let beyond = b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.";
    assert_eq!(parse(beyond).expect("valid").root().bytes(), None);
}

#[test]
fn foreign_globals_are_named_and_not_run() {
    for input in [
        &b"cposix\nsystem\n(S'echo hello'\ntR."[..],
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.",
    ] {
        let error = parse(input).expect_err("foreign");
        let text = error.to_string();
        assert!(matches!(error, PickleError::ForeignGlobal { .. }), "{text}");
        assert!(text.contains("posix.system at byte"), "{text}");
    }
    let text = parse(b"cos\x1b[2J\nsystem\n.").expect_err("foreign").to_string();
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn damage_is_a_typed_error() {
    let cases: [(&[u8], &str); 16] = [
        (b"", "cut off at byte 0"),
        (b"\x80\x02]", "cut off at byte 3"),
        (b"\x80\x09.", "newer than 5"),
        (b".", "the stack is empty"),
        (b"\xff", "operation 0xff at byte 0"),
        (
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff",
            "18446744073709551615 more bytes wanted, 0 left",
        ),
        (b"T\xff\xff\xff\xffabc", "4294967295 more bytes wanted, 3 left"),
        (b"h\x07.", "not remembered"),
        (b"e.", "a mark is missing"),
        (b"K\x01(0(a.", "the stack is empty"),
        (b"K\x01K\x02a.", "no list"),
        (b"}(K\x01u.", "a key has no value"),
        (b"K\x01)R.", "no global"),
        (b"c_codecs\nencode\nK\x01R.", "no tuple"),
        (
            b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.",
            "more than 64 bits",
        ),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
    ];
    for (input, expected) in cases {
        let text = parse(input).map(|_| ()).expect_err("damaged").to_string();
        assert!(text.contains(expected), "{input:?}: {text}");
    }
}

#[test]
fn deep_nesting_and_cycles_cost_no_stack() {
    // 400 KB of "]" then as many appends: a list 400,000 deep.
    let mut input = vec![b']'; 400_000];
    input.extend(vec![b'a'; 399_999]);
    input.push(b'.');
    let pickle = parse(&input).expect("deep but small");
    assert!(matches!(pickle.root().view(), View::List(values) if values.len() == 1));
    drop(pickle);
    let cyclic = parse(b"]q\x00h\x00a.").expect("a list within itself");
    match cyclic.root().view() {
        View::List(values) => assert_eq!(values.get(0).map(Value::id), Some(cyclic.root().id())),
        _ => panic!("not a list"),
    }
}

#[test]
fn limits_are_kept() {
    let limits = Limits {
        values: 10,
        stack: 8,
        memo: 2,
        string: 4,
    };
    for (input, expected) in [
        (&b"]0]0]0]0]0]0]0]0."[..], "more than 10 values"),
        (b"NNNNNNNNN.", "more than 8 values on the stack"),
        (b"Nq\x00q\x01q\x02.", "more than 2 remembered"),
        (b"U\x05abcde.", "more than 4 bytes in one string"),
    ] {
        let text = read(input, &[], &limits)
            .map(|_| ())
            .expect_err("over the limit")
            .to_string();
        assert!(text.contains(expected), "{text}");
    }
    assert!(read(b"U\x04abcd.", &[], &limits).is_ok());
}

#[test]
fn a_value_is_as_small_as_the_limits_say() {
    assert!(size_of::<Node>() <= 40, "{}", size_of::<Node>());
}

/// Every value that can be reached, without recursion.
fn walk(pickle: &Pickle) -> usize {
    let mut seen = std::collections::HashSet::new();
    let mut open = vec![pickle.root()];
    while let Some(value) = open.pop() {
        if !seen.insert(value.id()) {
            continue;
        }
        let _ = (value.bytes(), value.text(), value.kind());
        match value.view() {
            View::List(values) | View::Tuple(values) | View::Dict(values) => open.extend(values.iter()),
            View::Object(object) => {
                open.extend(object.args.iter());
                open.extend(object.items.iter());
                open.extend(object.appended.iter());
                open.extend(object.state);
            }
            View::Persistent(id) => open.push(id),
            _ => {}
        }
    }
    seen.len()
}

const OPCODES: &[u8] =
    b"(.012FIJKLMNQRSTUVXabcd}egh jl]pqrst)uGBC\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95\x96";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(input in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(pickle) = parse(&input) {
            prop_assert!(walk(&pickle) <= input.len() + 3);
        }
    }

    #[test]
    fn random_operations_never_panic(input in proptest::collection::vec(
        prop_oneof![4 => proptest::sample::select(OPCODES), 1 => 0u8..4, 1 => Just(b'\n')], 0..300)) {
        if let Ok(pickle) = parse(&input) {
            prop_assert!(walk(&pickle) <= input.len() + 3);
        }
    }

    #[test]
    fn mutated_files_never_panic(seed in 0usize..4, edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let seeds: [&[u8]; 4] = [
            b"\x80\x02]q\x00(U\x03abcq\x01U\x03defq\x02e]q\x03(\x88\x89e\x86q\x04.",
            b"\x80\x02c_codecs\nencode\nq\x00X\x03\x00\x00\x00\xc3\xbfaq\x01X\x06\x00\x00\x00latin1q\x02\x86R.",
            b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x94)R(\x8c\x01aK\x01u}b.",
            b"(lp0\nI1\naS'a\\x00b'\nap1\nV\\u20ac\na(I1\nI2\ntp3\na.",
        ];
        let mut input = seeds[seed].to_vec();
        for (index, byte) in edits {
            let at = index.index(input.len());
            input[at] = byte;
        }
        if let Ok(pickle) = parse(&input) {
            prop_assert!(walk(&pickle) <= input.len() + 3);
        }
    }
}
