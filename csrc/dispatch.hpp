// The choice of an instruction set at run time.
#pragma once

#include <string_view>
#include <vector>

#include "kernels.hpp"

namespace genssd {

// Returns the kernels of every instruction set that this processor runs, the best first.
const std::vector<const Kernels*>& supported_kernels();

// Returns the kernels in use, at first the best; null where this processor runs none.
const Kernels* active_kernels();

// Switches to the instruction set of a name. Returns false, and changes nothing, where this processor does not run it.
// emulated: whether also a set is taken that this processor does not run, because something emulates its instructions.
bool use_kernels(std::string_view name, bool emulated = false);

}  // namespace genssd
