// The list of formats, once, in the order of the enum: names, layout and scalar truth are looked up here.
#pragma once
#include "format/bf16.h"
#include "format/format.h"
#include "format/fp32.h"
#include "format/fp8.h"
#include "format/int4.h"
#include "format/int8.h"

namespace hetero {
namespace {

// Calls visit(F{}) with the struct of `format`.
template <class Visit> auto with_format(Format format, Visit&& visit) {
  switch (format) {
    case Format::fp32: break;
    case Format::bf16: return visit(Bf16{});
    case Format::fp8: return visit(Fp8{});
    case Format::int8: return visit(Int8{});
    case Format::int4: return visit(Int4{});
  }
  return visit(Fp32{});
}

}  // namespace
}  // namespace hetero
