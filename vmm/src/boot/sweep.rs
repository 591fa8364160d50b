//! Goes over a kernel's code instruction by instruction.
//!
//! Owns: [`sweep`], the one linear pass that all rewriting shares, and [`decode_at`] for following jumps. Must never:
//! change a byte.

use std::ops::Range;

use iced_x86::{ConstantOffsets, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

use super::image::{KernelImage, Span};

/// An instruction and where it is in the file.
pub(super) struct Site<'a, 'code> {
    /// The instruction, with the address that it is linked to.
    pub instruction: &'a Instruction,
    /// File offset of its first byte.
    pub offset: usize,
    decoder: &'a Decoder<'code>,
}

impl Site<'_, '_> {
    /// File offset of the lowest byte of its immediate operand.
    pub fn immediate_offset(&self) -> Option<usize> {
        let constants: ConstantOffsets = self.decoder.get_constant_offsets(self.instruction);
        constants.has_immediate().then(|| self.offset + constants.immediate_offset())
    }
}

/// Calls `visit` for each instruction of the image's code.
pub(super) fn sweep(image: &KernelImage, mut visit: impl FnMut(&Site<'_, '_>)) {
    for span in &image.code {
        sweep_span(&image.bytes, span, &mut visit);
    }
}

/// One run of code. Behind bytes that are no instruction the sweep goes on at the next byte.
fn sweep_span(bytes: &[u8], span: &Span, visit: &mut impl FnMut(&Site<'_, '_>)) {
    let mut decoder = Decoder::with_ip(64, &bytes[span.file.clone()], span.vaddr, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        if instruction.mnemonic() != Mnemonic::INVALID {
            visit(&Site { instruction: &instruction, offset: span.file.start + at, decoder: &decoder });
        } else if decoder.set_position(at + 1).is_ok() {
            decoder.set_ip(span.vaddr.wrapping_add(at as u64 + 1));
        } else {
            break;
        }
    }
}

/// The instruction linked to `address`, the file offset of its first byte, and where its constants are.
pub(super) fn decode_at(image: &KernelImage, address: u64) -> Option<(Instruction, usize, ConstantOffsets)> {
    const INSTRUCTION_BYTES_MAX: usize = 15;
    let Range { start: offset, end } = image.code_from(address)?;
    // Not beyond the span: a constant that is changed there would be data.
    let end = end.min(offset + INSTRUCTION_BYTES_MAX);
    let mut decoder = Decoder::with_ip(64, &image.bytes[offset..end], address, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let constants = decoder.get_constant_offsets(&instruction);
    (!instruction.is_invalid()).then_some((instruction, offset, constants))
}

/// The second operand, sign-extended to 64 bits as the CPU does for a 64-bit operation.
pub(super) fn immediate(instruction: &Instruction) -> Option<u64> {
    let kind = if instruction.op_count() > 1 { instruction.op1_kind() } else { return None };
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32
            | OpKind::Immediate32to64
            | OpKind::Immediate64
    )
    .then(|| instruction.immediate(1))
}
