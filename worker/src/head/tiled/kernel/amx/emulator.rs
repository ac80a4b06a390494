//! The six instructions of AMX that the kernel uses, for machines without them: the processor refuses each, and the handler of that
//! signal does what the manual says of it (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). What the manual
//! forbids ends the process, as it would there. So the kernel's own instructions are tested anywhere, slowly.
//!
//! It needs `unsafe` because it reads instructions, registers and memory of the thread that was interrupted.

use nix::libc::{self, greg_t};
use std::cell::RefCell;
use std::sync::Once;

/// Bytes of a tile's row at most, and rows.
const ROW: usize = 64;
const ROWS: usize = 16;

#[derive(Clone, Copy)]
struct Tile {
    /// As configured.
    rows: usize,
    row_bytes: usize,
    bytes: [[u8; ROW]; ROWS],
}

const EMPTY: Tile = Tile {
    rows: 0,
    row_bytes: 0,
    bytes: [[0; ROW]; ROWS],
};

thread_local! {
    /// The registers of a thread.
    static TILES: RefCell<[Tile; 8]> = const { RefCell::new([EMPTY; 8]) };
}

/// From now on the instructions work in this process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one, and the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            let set = libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut());
            assert_eq!(set, 0, "a handler for SIGILL");
        }
    });
}

/// The handler. Signals of this kind come from the instruction that is at hand, never from amid anything else.
extern "C" fn refused(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO the context of the thread that was interrupted.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: the processor has read the instruction from there.
    let length = unsafe { execute(at, registers) };
    registers[libc::REG_RIP as usize] += length as greg_t;
}

/// What cannot go on: a handler that panics ends the process.
fn end(why: &str) -> ! {
    panic!("an instruction that is not emulated, or not allowed: {why}")
}

/// The registers by their number in an instruction.
const NUMBERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Does what the instruction says; gives its length.
///
/// # Safety
/// `at` is an instruction that this processor refused in a thread with these registers.
unsafe fn execute(at: *const u8, registers: &[greg_t; 23]) -> usize {
    // SAFETY: of all these instructions, the shortest has 5 bytes; the rest is read once the bytes before say that it is there.
    let byte = |index: usize| unsafe { *at.add(index) };
    let of = |number: u8| registers[NUMBERS[usize::from(number)] as usize] as usize;
    // A VEX prefix of three bytes: C4, RXB and the map, W vvvv L pp; then the operation and its operands.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        end("not of AMX");
    }
    let extend = |bit: u8| !byte(1) >> bit & 1;
    let (prefix, third) = (byte(2) & 3, !byte(2) >> 3 & 15);
    let (operation, operands) = (byte(3), byte(4));
    let (mode, register, low) = (operands >> 6, operands >> 3 & 7, operands & 7);
    // The memory operand: its address, the register that is its index, and the bytes after the operands.
    let memory = || -> (usize, usize, usize) {
        let (mut length, mut row) = (0, 0);
        let base = match low {
            4 => {
                let scaled = byte(5);
                length += 1;
                let index = scaled >> 3 & 7 | extend(6) << 3;
                if index != 4 {
                    row = of(index) << (scaled >> 6);
                }
                scaled & 7
            }
            other => other,
        };
        if mode == 0 && base == 5 {
            end("an address without a base");
        }
        let offset = match mode {
            0 => 0,
            1 => isize::from(byte(5 + length) as i8),
            _ => {
                let bytes = std::array::from_fn(|index| byte(5 + length + index));
                i32::from_le_bytes(bytes) as isize
            }
        };
        length += [0, 1, 4][usize::from(mode)];
        (of(base | extend(5) << 3).wrapping_add_signed(offset), row, length)
    };
    let tile = usize::from(register);
    TILES.with_borrow_mut(|tiles| match (operation, prefix, mode) {
        // tilerelease
        (0x49, 0, 3) => {
            *tiles = [EMPTY; 8];
            5
        }
        // ldtilecfg
        (0x49, 0, _) => {
            let (from, _, length) = memory();
            // SAFETY: the instruction reads 64 bytes there.
            let read = unsafe { *(from as *const [u8; 64]) };
            if read[0] != 1
                || read[1..16]
                    .iter()
                    .chain(&read[32..48])
                    .chain(&read[56..])
                    .any(|byte| *byte != 0)
            {
                end("another palette, or reserved bytes");
            }
            for (number, tile) in tiles.iter_mut().enumerate() {
                *tile = EMPTY;
                tile.row_bytes =
                    usize::from(u16::from_le_bytes([read[16 + 2 * number], read[17 + 2 * number]]));
                tile.rows = usize::from(read[48 + number]);
                if tile.row_bytes > ROW || tile.rows > ROWS || (tile.rows == 0) != (tile.row_bytes == 0) {
                    end("a tile that is too large");
                }
            }
            5 + length
        }
        // tilezero
        (0x49, 3, 3) => {
            configured(&tiles[tile]);
            tiles[tile].bytes = [[0; ROW]; ROWS];
            5
        }
        // tileloadd, tilestored
        (0x4b, 2 | 3, 0..3) if low == 4 => {
            let (address, row, length) = memory();
            let tile = &mut tiles[tile];
            configured(tile);
            for (m, bytes) in tile.bytes.iter_mut().enumerate() {
                let (at, used) = (address + m * row, tile.row_bytes);
                if m >= tile.rows {
                    bytes.fill(0);
                } else if prefix == 3 {
                    bytes[used..].fill(0);
                    // SAFETY: the instruction reads there.
                    unsafe { std::ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), used) };
                } else {
                    // SAFETY: the instruction writes there.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, used) };
                }
            }
            5 + length
        }
        // tdpbf16ps
        (0x5c, 2, 3) => {
            if third > 7 || low == third || register == third || register == low {
                end("the same tile twice");
            }
            let (left, right) = (
                configured(&tiles[usize::from(low)]),
                configured(&tiles[usize::from(third)]),
            );
            let sums = &mut tiles[tile];
            configured(sums);
            if left.rows != sums.rows || left.row_bytes != 4 * right.rows || right.row_bytes != sums.row_bytes
            {
                end("tiles that do not fit together");
            }
            add_products(sums, &left, &right);
            5
        }
        _ => end("not of those that the kernel uses"),
    })
}

/// A copy of a tile that has a shape.
fn configured(tile: &Tile) -> Tile {
    match tile.rows {
        0 => end("a tile without a shape"),
        _ => *tile,
    }
}

/// Pairs of products, added up for the pairs' two halves apart; numbers that are not normal count as zero.
fn add_products(sums: &mut Tile, left: &Tile, right: &Tile) {
    let normal = |x: f32| if x.is_subnormal() { 0.0 * x } else { x };
    let values = |tile: &Tile| {
        let mut values = [[0f32; ROW / 2]; ROWS];
        for (row, bytes) in values.iter_mut().zip(&tile.bytes) {
            for (value, half) in row.iter_mut().zip(bytes.as_chunks().0) {
                *value = normal(f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16));
            }
        }
        values
    };
    let (left_values, right_values) = (values(left), values(right));
    for (of_row, sum) in left_values.iter().zip(&mut sums.bytes).take(sums.rows) {
        let mut halves = [0f32; ROW / 2];
        for (pair, of_pair) in of_row
            .as_chunks::<2>()
            .0
            .iter()
            .zip(&right_values)
            .take(right.rows)
        {
            for (at, half) in halves.iter_mut().enumerate() {
                // A product of two bf16 is exact in f32.
                *half += pair[at % 2] * of_pair[at];
            }
        }
        for (sum, both) in sum.as_chunks_mut().0.iter_mut().zip(halves.as_chunks::<2>().0) {
            *sum = normal(f32::from_le_bytes(*sum) + (both[0] + both[1])).to_le_bytes();
        }
    }
}
