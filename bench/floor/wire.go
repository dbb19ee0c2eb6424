package main

import (
	"encoding/binary"
	"errors"
)

// Kong's plugin-server protocol ProtoBuf:1 goes in frames: four bytes of length, least significant first, and a message
// of Protocol Buffers of that length. Kong's messages have integers and what has a length, and no other wire types.

const (
	lengthBytes   = 4
	maxFrameBytes = 16 << 20

	integerType = 0
	contentType = 2
)

var (
	errFieldCut  = errors.New("a field that does not end")
	errFieldType = errors.New("a field of a type that no message of Kong's has")
)

// field is one field of a message: an integer, or content (text, bytes or another message).
type field struct {
	number  uint64
	integer uint64
	content []byte
}

// cutField gives the first field of a message, and what follows it.
func cutField(message []byte) (field, []byte, error) {
	tag, size := binary.Uvarint(message)
	if size <= 0 {
		return field{}, nil, errFieldCut
	}
	rest := message[size:]
	value, size := binary.Uvarint(rest)
	if size <= 0 {
		return field{}, nil, errFieldCut
	}
	rest = rest[size:]
	switch tag & 7 {
	case integerType:
		return field{number: tag >> 3, integer: value}, rest, nil
	case contentType:
		if value > uint64(len(rest)) {
			return field{}, nil, errFieldCut
		}
		return field{number: tag >> 3, content: rest[:value]}, rest[value:], nil
	default:
		return field{}, nil, errFieldType
	}
}

func appendInteger(message []byte, number, value uint64) []byte {
	message = binary.AppendUvarint(message, number<<3|integerType)
	return binary.AppendUvarint(message, value)
}

func appendContent(message []byte, number uint64, content []byte) []byte {
	message = binary.AppendUvarint(message, number<<3|contentType)
	message = binary.AppendUvarint(message, uint64(len(content)))
	return append(message, content...)
}

func appendFrame(written, message []byte) []byte {
	written = binary.LittleEndian.AppendUint32(written, uint32(len(message)))
	return append(written, message...)
}
