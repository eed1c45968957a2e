//! Instructions that the CPU model does not have, though the host may: they are what older processors made of them.

use crate::asm;
use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::Exception;
use x86_defs::paging::*;

/// RAX after the instruction, or the vector of the exception; alike each time.
fn outcome(model: &str, bytes: &[u8]) -> Result<u64, u8> {
    let mut g = Guest::with_model(model);
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    g.long_with(&tables);
    g.code(|a| asm!(a; mov(eax, 7); mov(ebx, 0x10); mov(rsi, DATA); db(bytes); hlt();));
    g.ram.store(DATA, 0x0102_0304_0506_0708u64);
    let start = g.state();
    // Whoever translates does so the second time at the latest.
    let [first, again] = [0, 1].map(|_| {
        g.edit(|s| *s = start.clone());
        g.run();
        let s = g.state();
        g.frame_of(&s).map_or(Ok(s.gpr[0]), |frame| Err(frame.vector))
    });
    assert_eq!(first, again, "{model} {bytes:x?}");
    first
}

#[test]
fn what_the_model_lacks_does_not_exist() {
    let undefined = Err(Exception::InvalidOpcode.vector());
    let table: [(&str, &[u8], _, _); 11] = [
        // Counts of zero bits; without the feature a prefix that nobody heeds, in front of BSR and BSF.
        ("lzcnt", &[0xF3, 0x0F, 0xBD, 0xC3], Ok(27), Ok(4)),
        ("bmi1", &[0xF3, 0x0F, 0xBC, 0xC1], Ok(32), Ok(7)),
        ("popcnt", &[0xF3, 0x0F, 0xB8, 0xC3], Ok(1), undefined),
        ("movbe", &[0x48, 0x0F, 0x38, 0xF0, 0x06], Ok(0x0807_0605_0403_0201), undefined),
        // andn eax, ebx, ebx; shlx eax, ebx, ebx
        ("bmi1", &[0xC4, 0xE2, 0x60, 0xF2, 0xC3], Ok(0), undefined),
        ("bmi2", &[0xC4, 0xE2, 0x61, 0xF7, 0xC3], Ok(0x10_0000), undefined),
        // adcx eax, ebx
        ("adx", &[0x66, 0x0F, 0x38, 0xF6, 0xC3], Ok(0x17), undefined),
        // aesenc xmm0, xmm1; sha1nexte xmm0, xmm1; pclmulqdq xmm0, xmm1, 0; vpaddd ymm0, ymm0, ymm1
        ("aes", &[0x66, 0x0F, 0x38, 0xDC, 0xC1], Ok(7), undefined),
        ("sha", &[0x0F, 0x38, 0xC8, 0xC1], Ok(7), undefined),
        ("pclmulqdq", &[0x66, 0x0F, 0x3A, 0x44, 0xC1, 0], Ok(7), undefined),
        ("avx2", &[0xC5, 0xFD, 0xFE, 0xC1], Ok(7), undefined),
    ];
    for (feature, bytes, with, without) in table {
        assert_eq!(outcome("max", bytes), with, "with {feature}");
        assert_eq!(outcome(&format!("max,-{feature}"), bytes), without, "without {feature}");
    }
}
