#include "kernels.h"

namespace normjax {

NORMJAX_EACH_DTYPE(NORMJAX_ROWS, )

}  // namespace normjax
