//! The assembly's own text, interpreted on a model of the tile registers (Intel SDM volume 2, chapter 3, and
//! the ISA extensions reference), against the portable form.

use super::*;

/// The registers as `ldtilecfg` shapes them: eight of 16 rows of 64 bytes.
struct Machine {
    configuration: Configuration,
    tiles: [[[u8; 64]; 16]; 8],
}

impl Machine {
    fn new(configuration: Configuration) -> Self {
        assert_eq!(size_of::<Configuration>(), 64);
        assert_eq!((configuration.palette, configuration.start_row), (1, 0));
        for register in 0..16 {
            let (rows, row_bytes) = (configuration.rows[register], configuration.row_bytes[register]);
            assert!(rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0, "a fault: {configuration:?}");
            assert_eq!(rows == 0, row_bytes == 0, "a register without rows has no bytes, and the reverse");
            assert!(register < 8 || rows == 0, "palette 1 has eight registers");
        }
        Self { configuration, tiles: [[[0xAA; 64]; 16]; 8] }
    }

    fn shape(&self, register: usize) -> (usize, usize) {
        let shape = (self.configuration.rows[register], self.configuration.row_bytes[register]);
        assert!(shape.0 > 0, "tmm{register} is used without a shape");
        (usize::from(shape.0), usize::from(shape.1))
    }

    fn zero(&mut self, register: usize) {
        self.shape(register);
        self.tiles[register] = [[0; 64]; 16];
    }

    unsafe fn load(&mut self, register: usize, from: *const u8, stride: usize) {
        let (rows, row_bytes) = self.shape(register);
        self.tiles[register] = [[0; 64]; 16];
        for row in 0..rows {
            // SAFETY: the test's operands span these rows.
            let bytes = unsafe { std::slice::from_raw_parts(from.wrapping_add(row * stride), row_bytes) };
            self.tiles[register][row][..row_bytes].copy_from_slice(bytes);
        }
    }

    unsafe fn store(&self, register: usize, to: *mut u8, stride: usize) {
        let (rows, row_bytes) = self.shape(register);
        for row in 0..rows {
            // SAFETY: the test's sums span these rows.
            let out = unsafe { std::slice::from_raw_parts_mut(to.wrapping_add(row * stride), row_bytes) };
            out.copy_from_slice(&self.tiles[register][row][..row_bytes]);
        }
    }

    fn word(&self, register: usize, row: usize, lane: usize) -> [u8; 4] {
        self.tiles[register][row][4 * lane..4 * lane + 4].try_into().unwrap()
    }

    /// `sums += a * b`, with `step` for one group of a lane.
    fn dot(&mut self, [sums, a, b]: [usize; 3], step: fn([u8; 4], [u8; 4], [u8; 4]) -> [u8; 4]) {
        let (rows, row_bytes) = self.shape(sums);
        let (a_rows, a_bytes) = self.shape(a);
        let (b_rows, b_bytes) = self.shape(b);
        assert_eq!((rows, row_bytes, a_bytes), (a_rows, b_bytes, b_rows * 4), "shapes that fault");
        for row in 0..rows {
            for group in 0..a_bytes / 4 {
                for lane in 0..row_bytes / 4 {
                    let sum =
                        step(self.word(sums, row, lane), self.word(a, row, group), self.word(b, group, lane));
                    self.tiles[sums][row][4 * lane..4 * lane + 4].copy_from_slice(&sum);
                }
            }
        }
    }
}

fn step_bf16(sum: [u8; 4], a: [u8; 4], b: [u8; 4]) -> [u8; 4] {
    let value = |word: [u8; 4], half: usize| {
        f32::from_bits(u32::from(u16::from_le_bytes([word[2 * half], word[2 * half + 1]])) << 16)
    };
    let sum = f32::from_le_bytes(sum) + value(a, 0) * value(b, 0) + value(a, 1) * value(b, 1);
    sum.to_le_bytes()
}

fn step_int8(sum: [u8; 4], a: [u8; 4], b: [u8; 4]) -> [u8; 4] {
    let products = a.into_iter().zip(b).map(|(a, b)| i32::from(a) * i32::from(b.cast_signed()));
    (i32::from_le_bytes(sum) + products.sum::<i32>()).to_le_bytes()
}

/// The general registers, by the names that the text uses.
fn value<'a>(general: &'a mut [(String, usize)], name: &str) -> &'a mut usize {
    let entry = general.iter_mut().find(|entry| entry.0 == name);
    &mut entry.unwrap_or_else(|| panic!("no operand named {name}")).1
}

fn registers(call: &Call) -> Vec<(String, usize)> {
    let named = [
        ("a", call.a as usize),
        ("a_stride", call.a_stride),
        ("b0", call.b[0] as usize),
        ("b1", call.b[1] as usize),
        ("b_stride", call.b_stride),
        ("b_step", call.b_stride * STEP),
        ("steps", call.steps),
        ("tail", call.tail),
        ("out0", call.out[0] as usize),
        ("out1", call.out[1] as usize),
        ("out_stride", call.out_stride),
    ];
    named.map(|(name, value)| (format!("{{{name}}}"), value)).to_vec()
}

fn tile_register(text: &str) -> usize {
    text.trim().strip_prefix("tmm").expect("a tile register").parse().unwrap()
}

/// Interprets the text.
fn interpret(text: &str, call: &Call, machine: &mut Machine) {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut general = registers(call);
    let mut zero = false;
    let mut at = 0;
    let mut executed = 0;
    while at < lines.len() {
        executed += 1;
        assert!(executed < 100_000, "the text does not end");
        let (name, operands) = lines[at].split_once(' ').unwrap_or((lines[at], ""));
        let operands: Vec<&str> = operands.split(", ").collect();
        let address = |text: &str, general: &mut [(String, usize)]| {
            let (base, stride) = text.trim_matches(['[', ']']).split_once(" + ").expect("base and stride");
            let stride = stride.strip_suffix("*1").expect("a scale of one");
            (*value(general, base), *value(general, stride))
        };
        match name {
            "tilezero" => machine.zero(tile_register(operands[0])),
            "tileloadd" => {
                let (base, stride) = address(operands[1], &mut general);
                // SAFETY: the address came from the call's operands.
                unsafe { machine.load(tile_register(operands[0]), base as *const u8, stride) };
            }
            "tilestored" => {
                let (base, stride) = address(operands[0], &mut general);
                // SAFETY: as above.
                unsafe { machine.store(tile_register(operands[1]), base as *mut u8, stride) };
            }
            "tdpbf16ps" => machine.dot([0, 1, 2].map(|at| tile_register(operands[at])), step_bf16),
            "tdpbusd" => machine.dot([0, 1, 2].map(|at| tile_register(operands[at])), step_int8),
            "add" => {
                let amount = operands[1].parse().unwrap_or_else(|_| *value(&mut general, operands[1]));
                *value(&mut general, operands[0]) += amount;
            }
            "dec" => {
                let register = value(&mut general, operands[0]);
                *register -= 1;
                zero = *register == 0;
            }
            "test" => {
                assert_eq!(operands[0], operands[1]);
                zero = *value(&mut general, operands[0]) == 0;
            }
            "jz" | "jnz" => {
                if zero == (name == "jz") {
                    let label = format!("{}:", &operands[0][..1]);
                    at = lines.iter().position(|line| *line == label).expect("the label");
                }
            }
            label if label.ends_with(':') => {}
            other => panic!("unknown instruction {other}"),
        }
        at += 1;
    }
}

fn emulated(text: &'static str, case: &Case, precision: Precision) -> Vec<f32> {
    let (a, b) = case.operands(precision);
    let tile = case.tile(&a, &b);
    let mut sums = vec![[f32::NAN; LANES]; case.rows * case.panels];
    by_pairs(&tile, sums.as_mut_ptr(), |call| {
        let mut machine = Machine::new(configuration(tile.rows, tile.groups % STEP));
        interpret(text, call, &mut machine);
    });
    sums.into_iter().flatten().collect()
}

#[test]
fn the_text_multiplies() {
    for rows in [1, 2, 7, 15, 16] {
        for panels in [1, 2, 4] {
            for groups in [1, 15, 16, 17, 32, 47, 144] {
                let case = Case::new(rows, panels, groups);
                let run = |precision| {
                    // SAFETY: the case's operands have the sizes of its tile.
                    unsafe { case.run(tile_portable::form(precision), precision) }
                };
                let place = format!("{rows} rows, {panels} panels, {groups} groups");
                let int8 = emulated(two_panels!("tdpbusd"), &case, Precision::Int8);
                let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&int8), bits(&run(Precision::Int8)), "{place}");
                let bf16 = emulated(two_panels!("tdpbf16ps"), &case, Precision::Bf16);
                for (found, expected) in bf16.iter().zip(run(Precision::Bf16)) {
                    assert!((found - expected).abs() < 1e-4 * groups as f32, "{place}: {found}, {expected}");
                }
            }
        }
    }
}

/// On a processor with AMX this is the real thing; on others it says why not.
#[test]
fn a_processor_passes_the_self_test_or_says_why_not() {
    match permit() {
        Ok(()) => eprintln!("AMX: the self-test passed on this processor"),
        Err(reason) => eprintln!("AMX is not run here: {reason}"),
    }
}
