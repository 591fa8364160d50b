//! Each rule that `image.rs` states, broken by one handmade file.

use std::path::Path;

use super::*;
use crate::boot::testing::{BODY_OFFSET, CODE_PADDR, CODE_VADDR, Handmade, TestSegment};

const CODE: [u8; 4] = [0x90, 0x90, 0x90, 0xc3];
const ALLOC: u64 = SHF_ALLOC;
const WAX: u64 = SHF_ALLOC | SHF_WRITE | SHF_EXECINSTR;
const AX: u64 = SHF_ALLOC | SHF_EXECINSTR;

fn parse(elf: &Handmade) -> Result<KernelImage, BootError> {
    KernelImage::parse(elf.bytes(), Path::new("handmade"))
}

#[track_caller]
fn refused(elf: &Handmade, says: &str) {
    let error = parse(elf).unwrap_err().to_string();
    assert!(error.contains(says), "{error}");
}

fn spans(spans: &[Span]) -> Vec<(u64, usize)> {
    spans.iter().map(|span| (span.vaddr - CODE_VADDR, span.file.len())).collect()
}

#[test]
fn code_is_what_is_executable_and_not_writable() {
    let elf = Handmade::of(&CODE)
        .with_section(".data", WAX, &[0x0f, 0x31])
        .with_section(".rodata", ALLOC, &[0x0f, 0x31, 1])
        .with_section(".init.text", AX, &[0x0f, 0x31, 0xc3, 0xc3, 0xc3]);
    let image = parse(&elf).unwrap();
    assert_eq!(spans(&image.code), [(0, 4), (9, 5)]);
    assert_eq!(spans(&image.data), [(4, 2), (6, 3)]);
}

#[test]
fn the_entry_point_lies_in_an_executable_section_of_whatever_segment() {
    let mut elf = Handmade::of(&[1; 4]).with_section(".init.text", AX, &CODE);
    elf.sections[0].flags = ALLOC;
    elf.entry = CODE_PADDR + 4;
    elf.segments[0].flags = 6; // R+W, as from 6.18 on
    assert_eq!(parse(&elf).unwrap().entry_vaddr, CODE_VADDR + 4);
    for (entry, says) in [
        (CODE_PADDR + 3, "in no executable section"),
        (CODE_PADDR + 8, "in no executable section"),
        (CODE_PADDR - 1, "in no executable section"),
        (CODE_VADDR + 4, "is a linked address"),
    ] {
        refused(&Handmade { entry, ..elf.clone() }, says);
    }
}

#[test]
fn an_entry_point_in_writable_code_is_refused() {
    let mut elf = Handmade::of(&CODE).with_section(".data", WAX, &CODE);
    elf.entry = CODE_PADDR + 4;
    refused(&elf, "is in the section .data, which is writable");
}

#[test]
fn a_file_without_section_table_is_refused() {
    let mut elf = Handmade::of(&CODE);
    elf.sections.clear();
    refused(&elf, "has no section table");
    // The table is there, but says that it is empty.
    let mut bytes = Handmade { extended_numbering: false, ..Handmade::of(&CODE) }.bytes();
    bytes[60..62].fill(0);
    let error = KernelImage::parse(bytes, Path::new("handmade")).unwrap_err();
    assert!(matches!(error, BootError::NoSections { .. }), "{error}");
}

#[test]
fn numbers_that_do_not_fit_in_the_header_are_read_from_section_0() {
    let elf = Handmade::of(&CODE).with_section(".rodata", ALLOC, &[7; 3]);
    let image = parse(&Handmade { extended_numbering: true, ..elf.clone() }).unwrap();
    assert_eq!((spans(&image.code), spans(&image.data)), (vec![(0, 4)], vec![(4, 3)]));
    let mut without = Handmade { extended_numbering: true, ..elf };
    without.sections.clear();
    refused(&without, "the number of its segments is in its section table, but has none");
}

#[test]
fn segments_that_contradict_themselves_are_refused() {
    let with = |change: &dyn Fn(&mut TestSegment)| {
        let mut elf = Handmade::of(&CODE);
        change(&mut elf.segments[0]);
        elf
    };
    refused(&with(&|s| s.memory_bytes = 3), "4 bytes in the file, more than its 3 in memory");
    refused(&with(&|s| s.memory_bytes = u64::MAX), "ends past the last address");
    refused(&with(&|s| s.paddr = u64::MAX - 2), "ends past the last address");
    refused(&with(&|s| s.vaddr = u64::MAX - 2), "ends past the last address");
    refused(&with(&|s| s.offset = u64::MAX - 2), "incomplete");
    refused(&with(&|s| s.kind = PT_DYNAMIC), "an ordinary program");
    refused(&with(&|s| s.kind = 0), "no loadable segment");
    refused(&with(&|s| (s.file_bytes, s.memory_bytes) = (0, 0)), "no loadable segment");
}

#[test]
fn segments_that_overlap_are_refused() {
    let with_second = |change: &dyn Fn(&mut TestSegment)| {
        let mut elf = Handmade::of(&CODE).with_section(".rodata", ALLOC, &CODE);
        let first = &mut elf.segments[0];
        (first.file_bytes, first.memory_bytes) = (4, 4);
        let mut second = *first;
        (second.offset, second.vaddr, second.paddr) = (BODY_OFFSET + 4, CODE_VADDR + 4, CODE_PADDR + 4);
        change(&mut second);
        elf.segments.push(second);
        elf
    };
    assert_eq!(parse(&with_second(&|_| {})).unwrap().segments.len(), 2);
    refused(&with_second(&|s| s.paddr -= 1), "overlap in memory, at 0x1000003");
    refused(&with_second(&|s| s.vaddr -= 1), "overlap in linked addresses");
    refused(&with_second(&|s| s.offset -= 1), "overlap in the file");
    // The first one's zeros reach into the second.
    let mut elf = with_second(&|_| {});
    elf.segments[0].memory_bytes = 5;
    refused(&elf, "overlap in memory, at 0x1000004");
    elf.segments.reverse();
    refused(&elf, "overlap in memory, at 0x1000004");
}

#[test]
fn code_must_be_loaded_from_where_it_is_to_where_it_is_linked() {
    let with = |at: usize, change: &dyn Fn(&mut Handmade)| {
        let mut elf = Handmade::of(&CODE).with_section(".exit.text", AX, &CODE);
        elf.sections[at].name = ".odd";
        change(&mut elf);
        elf
    };
    let says = "its section .odd of code is not loaded from there";
    refused(&with(1, &|elf| elf.sections[1].vaddr += 8), says);
    refused(&with(1, &|elf| elf.sections[1].len_bytes += 1), says);
    refused(&with(1, &|elf| elf.segments[0].file_bytes = 4), says);
    refused(&with(0, &|elf| elf.sections[0].offset -= 0x100), says);
    refused(&with(1, &|elf| elf.sections[1].flags |= SHF_COMPRESSED), "in section .odd is compressed");
    refused(&with(1, &|elf| elf.sections[1].offset = u64::MAX), "incomplete");
}

#[test]
fn no_byte_belongs_to_two_sections_or_to_none() {
    let mut elf = Handmade::of(&CODE).with_section(".rodata", ALLOC, &[1; 4]);
    elf.sections[1].offset -= 1;
    refused(&elf, "two of its sections overlap in the file, at 0x403");
    elf.sections[1].offset += 2;
    elf.sections[1].len_bytes -= 1;
    refused(&elf, "what it loads from 0x404 of the file on belongs to no section");
    for padding in [0, 0xcc, 0x90] {
        elf.body[4] = padding;
        assert!(parse(&elf).is_ok());
    }
    elf.sections.truncate(1);
    refused(&elf, "what it loads from 0x405");
}

#[test]
fn headers_that_are_loaded_with_the_code_are_padding() {
    let mut elf = Handmade::of(&CODE);
    let segment = &mut elf.segments[0];
    segment.offset = 0;
    (segment.vaddr, segment.paddr) = (segment.vaddr - BODY_OFFSET, segment.paddr - BODY_OFFSET);
    segment.file_bytes += BODY_OFFSET;
    segment.memory_bytes += BODY_OFFSET;
    assert!(parse(&elf).is_ok());
}
